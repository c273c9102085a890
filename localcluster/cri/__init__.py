"""The process runtime: a Kubernetes Container Runtime Interface whose containers are local processes."""
