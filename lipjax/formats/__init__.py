"""What lies in files: certificates, their arrays, and writing that cannot be half done."""
