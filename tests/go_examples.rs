//! Go programs that nobody here wrote: the examples of controller-runtime and client-go, unchanged.
//!
//! `just test-go-operators` builds them (`go-examples.sh`) and runs these tests, which are left out
//! otherwise: they add nothing to `go_operators.rs` but that these are other people's programs.

mod common;

use common::cluster::{Cluster, Namespace};
use common::operator::{Operator, Setup};
use common::{PATIENCE, wait_for};
use serde_json::{Value, json};

/// Starts an example as a child that sleeps whenever it can.
fn start(cluster: &Cluster, example: &str, mut fields: Value) -> Operator {
    fields["idleSeconds"] = 0.01.into();
    fields["prediction"] = "never".into();
    let mut setup = Setup::on(cluster);
    setup.set("RUST_LOG", "debug,wasmer=error,virtual_fs=error");
    setup.guest("example", &format!("go-example-{example}"), &[], fields);
    setup.start()
}

/// It had one life, and slept in it.
fn assert_slept(operator: &Operator) {
    let messages = operator.messages("example");
    let end = messages.iter().find(|m| m.contains("starting again"));
    assert_eq!(end, None);
    assert!(messages.iter().any(|m| m.starts_with("woken")));
}

fn pods(namespace: &Namespace) -> String {
    format!("/api/v1/namespaces/{}/pods", namespace.name)
}

/// What the API server wants of a pod.
fn pod_spec() -> Value {
    json!({"containers": [{"name": "main", "image": "none"}]})
}

#[test]
#[ignore = "just test-go-operators builds what it needs"]
fn builtins_labels_replica_sets_and_has_a_webhook_server() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let mut operator = start(cluster, "builtins", json!({}));
    operator.wait_for_line("hibernated");
    let sets = format!("/apis/apps/v1/namespaces/{}/replicasets", namespace.name);
    let set = json!({
        "metadata": {"name": "object"},
        "spec": {
            "replicas": 0, "selector": {"matchLabels": {"a": "b"}},
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": pod_spec()},
        },
    });
    cluster.create(&sets, &set);
    wait_for("the label", PATIENCE, || {
        let set = cluster.get(&format!("{sets}/object"))?;
        (set["metadata"]["labels"]["hello"] == "world").then_some(())
    });
    operator.wait_for_line("Serving webhook server");
    operator.stop();
    assert_slept(&operator);
}

#[test]
#[ignore = "just test-go-operators builds what it needs"]
fn crd_makes_pods_and_deletes_them_when_their_time_has_come() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let crd = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "chaospods.chaosapps.metamagical.io"},
        "spec": {
            "group": "chaosapps.metamagical.io", "scope": "Namespaced",
            "names": {"kind": "ChaosPod", "plural": "chaospods", "singular": "chaospod"},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            }],
        },
    });
    cluster.install_crd(
        crd.to_string().as_bytes(),
        "/apis/chaosapps.metamagical.io/v1/chaospods",
    );
    let operator = start(cluster, "crd", json!({}));
    operator.wait_for_line("hibernated");
    let chaos = format!(
        "/apis/chaosapps.metamagical.io/v1/namespaces/{}/chaospods",
        namespace.name
    );
    let object = json!({
        "apiVersion": "chaosapps.metamagical.io/v1", "kind": "ChaosPod",
        "metadata": {"name": "object"},
        "spec": {"template": {"metadata": {}, "spec": pod_spec()}, "nextStop": "2020-01-01T00:00:00Z"},
    });
    cluster.create(&chaos, &object);
    let pod = format!("{}/object", pods(&namespace));
    let uid = || Some(cluster.get(&pod)?["metadata"]["uid"].clone());
    let first = wait_for("a pod", PATIENCE, uid);
    // 10 or 20 s later, by RequeueAfter.
    wait_for("another pod", PATIENCE, || {
        uid().filter(|uid| *uid != first)
    });
    assert_slept(&operator);
}

#[test]
#[ignore = "just test-go-operators builds what it needs"]
fn typed_sees_ingresses() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let mut operator = start(cluster, "typed", json!({}));
    operator.wait_for_line("hibernated");
    let before = operator.count("woken");
    let ingresses = format!(
        "/apis/networking.k8s.io/v1/namespaces/{}/ingresses",
        namespace.name
    );
    let backend = json!({"service": {"name": "a", "port": {"number": 80}}});
    let ingress = json!({"metadata": {"name": "object"}, "spec": {"defaultBackend": backend}});
    cluster.create(&ingresses, &ingress);
    operator.wait_for_lines("woken", before + 1);
    operator.stop();
    assert_slept(&operator);
}

#[test]
#[ignore = "just test-go-operators builds what it needs"]
fn priorityqueue_reconciles_config_maps_while_it_sleeps_in_reconcile() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let operator = start(cluster, "priorityqueue", json!({}));
    namespace.create_config_map("first-object", json!({}));
    namespace.create_config_map("second-object", json!({}));
    // Each takes 10 s of time.Sleep.
    for name in ["first-object", "second-object"] {
        operator.wait_for(name, |lines| {
            let is_it = |l: &&String| l.contains("\"Reconciling\"") && l.contains(name);
            lines.iter().find(is_it).map(drop)
        });
    }
    assert_slept(&operator);
}

#[test]
#[ignore = "just test-go-operators builds what it needs"]
fn workqueue_prints_what_happens_to_pods() {
    let cluster = Cluster::shared();
    let name = format!("pod-{}", std::process::id());
    let operator = start(
        cluster,
        "workqueue",
        json!({"args": ["-kubeconfig", "/etc/kubernetes/kubeconfig"]}),
    );
    operator.wait_for_line("Starting Pod controller");
    let path = "/api/v1/namespaces/default/pods";
    let account = json!({"metadata": {"name": "default"}});
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    if cluster.get(&format!("{accounts}/default")).is_none() {
        cluster.create(accounts, &account);
    }
    cluster.create(
        path,
        &json!({"metadata": {"name": name}, "spec": pod_spec()}),
    );
    operator.wait_for_line(&format!("Sync/Add/Update for Pod {name}"));
    cluster.delete(&format!("{path}/{name}?gracePeriodSeconds=0"));
    operator.wait_for_line(&format!("Pod default/{name} does not exist anymore"));
    assert_slept(&operator);
}

#[test]
#[ignore = "just test-go-operators builds what it needs"]
fn leader_election_holds_its_lease_asleep_and_gives_it_back_at_the_end() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let args = [
        "-lease-lock-name=lock".to_owned(),
        format!("-lease-lock-namespace={}", namespace.name),
        "-id=child".to_owned(),
    ];
    let mut operator = start(cluster, "leader-election", json!({"args": args}));
    let path = format!(
        "/apis/coordination.k8s.io/v1/namespaces/{}/leases/lock",
        namespace.name
    );
    let lease = || cluster.get(&path).map(|lease| lease["spec"].clone());
    let first = wait_for("the lease", PATIENCE, || {
        lease().filter(|l| l["holderIdentity"] == "child")
    });
    wait_for("its renewal", PATIENCE, || {
        lease().filter(|l| l["renewTime"] != first["renewTime"])
    });
    operator.stop();
    assert_slept(&operator);
    let last = lease().unwrap();
    assert_eq!(
        last["holderIdentity"].as_str().unwrap_or_default(),
        "",
        "{last}"
    );
}
