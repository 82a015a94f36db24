"""How good classifiers and images are: functions of arrays."""
