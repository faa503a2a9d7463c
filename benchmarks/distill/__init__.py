"""Few-step students measured: a 2-D toy with a known answer, and the Shapes model."""
