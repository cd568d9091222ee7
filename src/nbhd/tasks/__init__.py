"""What the models are for: reading pictures, training, evaluating, predicting. One folder a task, one shared core."""
