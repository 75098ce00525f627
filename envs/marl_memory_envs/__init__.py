"""Tasks: PettingZoo environments stepped as TorchRL vectors."""
