"""Parts of the pages that commands write: one HTML file each, without a network, light or dark as the system is."""
