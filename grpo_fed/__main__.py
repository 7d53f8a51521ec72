"""`python -m grpo_fed` is `grpo-fed`."""

from grpo_fed.cli import main

main()
