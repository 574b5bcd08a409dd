"""Places in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "minilm-l6-squad"
"""The shipped checkpoint."""
