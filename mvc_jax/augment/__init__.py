"""Image augmentation as jitted vmap ops on the device."""
