//! Numbers of bytes with units, as Kubernetes writes them.

/// Reads a Kubernetes quantity of bytes: a whole number with a suffix such as `Mi` or `M`, or none
/// (<https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>). `MiB` is
/// `Mi`.
pub fn bytes(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor = match suffix.strip_suffix('B').unwrap_or(suffix) {
        "" => 1,
        "k" | "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_units() {
        for (text, expected) in [
            ("64Mi", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("1G", Some(1_000_000_000)),
            ("7", Some(7)),
            ("1.5Gi", None),
            ("Mi", None),
            ("99999999999Gi", None),
        ] {
            assert_eq!(bytes(text), expected, "{text}");
        }
    }
}
