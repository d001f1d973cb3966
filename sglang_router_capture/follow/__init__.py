"""Followers: rows go where the KV goes, or come from elsewhere, a file for each way."""
