"""Who sends a request, and how that is proved.

caller          the record of it, and the caller of the running request: pure
credentials     from the metadata of a request to its caller, or the refusal
keys            API keys: pure
tokens          JSON Web Tokens (RFC 7519) of an identity provider
audit           one line for each request, without its content
lines           writes these lines in a thread
provider        the provider's public keys, from a file or a URL
"""
