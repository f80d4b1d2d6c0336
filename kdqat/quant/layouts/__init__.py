"""Bit layouts of serving formats: codes and scales to bytes and back, as pure functions of tensors."""
