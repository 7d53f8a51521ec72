"""What carries a federation's messages: this machine's processes, or Flower on many."""
