"""What a person looks at: plots of what a run found."""
