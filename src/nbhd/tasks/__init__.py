"""What the models are for: reading pictures, training, evaluating, predicting. One folder a task over one shared core."""
