//! Prints the custom resource definition.

use kube::CustomResourceExt;

fn main() {
    println!(
        "{}",
        serde_json::to_string_pretty(&greeter::Greeting::crd()).unwrap()
    );
}
