"""What preference methods have in common: kernels, roll-outs, scores, selection. One file each."""
