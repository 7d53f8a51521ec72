"""The client app: loads the arrays that it receives, trains with PPO, and sends the new arrays."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from stable_baselines3 import PPO

from sb3_peer.work import NOTHING, learner, one_thread

app = ClientApp()

LEARNERS: dict[int, PPO] = {}
"""Environments and optimiser of every client that this actor has trained; Flower gives a client to any free actor."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the parameters that the server sent."""
    content = message.content
    arrays, config = content["arrays"], content["config"]
    if config["task"] == NOTHING:
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
    client = int(context.node_config["partition-id"])
    if client not in LEARNERS:
        one_thread()
        LEARNERS[client] = learner(str(config["task"]), client)
    model = LEARNERS[client]
    before = model.num_timesteps
    model.policy.load_state_dict(arrays.to_torch_state_dict())
    model.learn(int(config["steps"]), reset_num_timesteps=False)
    metrics = MetricRecord({"num-examples": model.num_timesteps - before})
    return Message(RecordDict({"arrays": ArrayRecord(model.policy.state_dict()), "metrics": metrics}), reply_to=message)
