"""How clients with a language model learn: adapters on one frozen base, trained by what completions are rewarded.

learner.py      LanguageLearner.train: the loop. Write, judge, update
policies.py     what a federation asks of the clients' adapters, beside training them
model.py        the base and its tokenizer, and probabilities under adapters
texts.py        a client's prompts, completions and rewards, drawn by number
batches.py      a batch of completions
examples.py     what a client writes before and after training, for people
sampling.py     writing completions, token by token
objective.py    what a batch of completions is learned with, and the loss
update.py       Adam over passes on a batch
measurement.py  KL and Fisher diagonal on completions that stay with the client
"""
