"""The networks of a pipeline: which denoise, what they cost, their gradients and memory."""
