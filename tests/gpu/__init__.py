"""What one GPU must show before its times are worth anything: ``python -m tests.gpu.smoke``."""
