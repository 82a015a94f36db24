"""The mathematics of diffusion: losses, guidance, samplers; given a `denoise`."""
