"""What the tests use in place of torchvision, which no test may depend on."""
