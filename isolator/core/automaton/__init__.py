"""HTTP rules as an automaton that the kernel can run: see `build` for the whole, `states` for its vocabulary."""
