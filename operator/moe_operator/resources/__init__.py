"""The MoEDeployment resource: its one typed definition, from which the CRD is generated.

Pure: no cluster, no network. `names` holds what is called how, `spec` what users write, `status` what they
read, `crd` the generator.
"""
