"""What a person sees of a run, and its copy in MLflow. The run folder is the truth, MLflow a copy of it."""
