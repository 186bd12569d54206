"""What one does with the model."""
