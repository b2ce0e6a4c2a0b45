"""What everything else stands on: errors, files, versions, the registry, the config's schema."""
