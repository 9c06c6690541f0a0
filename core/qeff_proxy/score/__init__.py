"""Score: what a backend's precision costs on a text, in perplexity and divergence."""

from qeff_proxy.score.results import BackendScore, Score
from qeff_proxy.score.score_model import ScoreOptions, score_model

__all__ = ["BackendScore", "Score", "ScoreOptions", "score_model"]
