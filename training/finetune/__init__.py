"""Fine-tuning on pictures with captions: style, subject, concept."""
