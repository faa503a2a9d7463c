"""The stage "decisions": whole solver schedules proposed by Optuna (S3, arXiv 2312.07243) and scored."""
