"""Models whose right answer is known in closed form: the networks of laws, tests and benchmarks.

gaussian         data N(mean, variance), in any scheduler's prediction type; pictures of any shape
guided_mixture   six Gaussians in 16 dimensions under classifier-free guidance
posterior_means  eight Gaussians in 32 dimensions, and the digits of scikit-learn
chain            one-dimensional mixtures behind a scheduler, for what steers
masked_tokens    four tokens that are unmasked, 256 states: every law by enumeration
"""
