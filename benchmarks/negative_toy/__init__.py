"""Negative prompts on a world of sixteen points, where guidance is known in closed form."""
