"""What else is like it: nearest neighbours, properties, clusters, differences of cohorts."""
