"""The encoders: everything between a waveform and its tokens, as `torch.nn` modules."""
