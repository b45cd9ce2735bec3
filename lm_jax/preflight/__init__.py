"""What a training step would need and take on machines that are not here, asked of their own compiler."""
