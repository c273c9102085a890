"""The MoEDeployment resource: its one typed definition, from which the CRD is generated.

Pure: no cluster, no network. `spec` is what users write, with a `*_spec` for each section; `status` is what
they read, with `scaling_status`. `deployment` is an object as the API server returns it, `names` has names of
objects, labels and ports, `crd` generates the CRD.
"""
