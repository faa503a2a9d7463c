"""The page of `diffplug demo`: Gradio components around the studio. Needs the extra `demo`."""
