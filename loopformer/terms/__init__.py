"""Terms: what is learned from rollouts. One file a part."""
