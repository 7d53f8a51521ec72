"""Language models: one frozen base, and the adapters of K clients, stacked.

    shape.py        ModelShape: a model's dimensions, from config.json or GGUF
    source.py       the files of a model, read tensor by tensor
    base.py         FrozenBase: the weights, mapped into memory once for all processes of a machine
    adapters.py     AdapterPolicy: the adapters as a policy, cut into layers
    transformer.py  Transformer: hidden states and logits of K clients at once
    cache.py        Cache: keys and values of the tokens before
    tokenizer.py    Tokenizer: text to tokens and back, and the chat template
    peft_folder.py  a client's adapters as a folder that the library peft opens
    merged_folder.py  a client's adapters added to their base, as a whole model
    make_tiny.py    makes the model that ships with grpo_fed, in the folder tiny

Begin with transformer.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.policy.language.adapters import AdapterPolicy
    from grpo_fed.policy.language.base import FrozenBase, open_base, read_base_facts
    from grpo_fed.policy.language.cache import Cache
    from grpo_fed.policy.language.peft_folder import read_peft_folder, write_peft_folder
    from grpo_fed.policy.language.shape import ModelShape
    from grpo_fed.policy.language.tokenizer import Tokenizer, open_tokenizer
    from grpo_fed.policy.language.transformer import Transformer

__all__ = [
    "AdapterPolicy",
    "Cache",
    "FrozenBase",
    "ModelShape",
    "Tokenizer",
    "Transformer",
    "open_base",
    "open_tokenizer",
    "read_base_facts",
    "read_peft_folder",
    "write_peft_folder",
]

MODULES = {
    "AdapterPolicy": "grpo_fed.policy.language.adapters",
    "Cache": "grpo_fed.policy.language.cache",
    "FrozenBase": "grpo_fed.policy.language.base",
    "ModelShape": "grpo_fed.policy.language.shape",
    "Tokenizer": "grpo_fed.policy.language.tokenizer",
    "Transformer": "grpo_fed.policy.language.transformer",
    "open_base": "grpo_fed.policy.language.base",
    "open_tokenizer": "grpo_fed.policy.language.tokenizer",
    "read_base_facts": "grpo_fed.policy.language.base",
    "read_peft_folder": "grpo_fed.policy.language.peft_folder",
    "write_peft_folder": "grpo_fed.policy.language.peft_folder",
}

__getattr__ = lazy_getattr(__name__, MODULES)
