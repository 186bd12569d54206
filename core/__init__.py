"""The model (see the full map below once written)."""
