"""`fedmq models`: the versions of a job's model - listed, compared, named, kept, taken out."""
