"""Judges: who says which completion is better. A new judge is one file here and one line in `JudgeSettings`."""

from rl.judges.base import Judge
from rl.judges.oracle import OracleSettings

JudgeSettings = OracleSettings

__all__ = ["Judge", "JudgeSettings", "OracleSettings"]
