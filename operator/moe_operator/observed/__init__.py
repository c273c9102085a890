"""What the cluster has, as typed records. Objects of the API server are parsed here, once; pure.

observation  everything that concerns one deployment
pods         its pods; pod_status: what the kubelet and the scheduler report
problems     why a pod does not run; scheduling reads the scheduler's summary
children     objects that belong to it; ownership: which of their fields the operator owns
nodes        nodes, and what pods ask of them
routes       to which leaders a frontend routes
downloads    how far a pod is with downloading the model
"""
