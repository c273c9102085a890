"""`moe-worker fetch`: brings a checkpoint from a hub or an object store into a cache that replicas share.

location   what a URI means. Pure
listing    which files a checkpoint consists of, and the key of their content. Pure
sources    clients of Hugging Face's hub and of object stores: list files, download one
cache      entries by content, locks among processes, room on the disk, eviction
transfer   downloads and checks the files of an entry
meter      how much is there, and how long the rest takes; served over gRPC to the operator
command    puts it together
"""
