"""LoopUS: a pretrained decoder becomes a loop (Park et al., 2605.11011)."""
