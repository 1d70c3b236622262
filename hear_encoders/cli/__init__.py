"""Commands: `hear-embed`, `hear-weights`, and embedding a corpus under torchrun."""
