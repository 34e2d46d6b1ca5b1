//! The sample operators and kube-rs's own ways, end to end against a real API server.

mod common;

use std::time::{Duration, Instant};

use common::cluster::{Cluster, Namespace};
use common::fault_proxy::{Fault, FaultProxy};
use common::operator::{Operator, Setup};
use common::wat::{Wat, kind, stubborn, ticking};
use common::{PATIENCE, repository, wait_for};
use serde_json::{Value, json};

/// Two children of those guests, each copying from the other's target.
fn ring_of_two(east: &str, west: &str) {
    let cluster = Cluster::shared();
    let (here, there) = (cluster.namespace(), cluster.namespace());
    let mut setup = Setup::on(cluster);
    for (name, guest, source, target) in
        [("east", east, &here, &there), ("west", west, &there, &here)]
    {
        let env = [
            ("IN_NAMESPACE", source.name.as_str()),
            ("OUT_NAMESPACE", target.name.as_str()),
        ];
        setup.guest(name, guest, &env, json!({}));
    }
    // One object is there before its operator, one comes later.
    here.set_nonce("early", 7);
    let mut operator = setup.start();
    there.wait_for_nonce("early", 7);
    for nonce in 1..5 {
        let (from, to) = if nonce % 2 == 0 {
            (&here, &there)
        } else {
            (&there, &here)
        };
        from.set_nonce("late", nonce);
        to.wait_for_nonce("late", nonce);
    }
    operator.stop();
    assert_eq!(operator.count("starting again"), 0);
}

#[test]
fn two_children_on_kube_rs_form_a_ring() {
    ring_of_two("ring", "ring");
}

#[test]
fn two_children_on_the_typed_abi_form_a_ring() {
    ring_of_two("ring-thin", "ring-thin");
}

#[test]
fn a_child_in_c_and_one_on_kube_rs_form_a_ring() {
    // What builds it is no part of a Rust toolchain; `guests/build.sh` has said that it is missing.
    if !repository().join("guests/out/c-thin.wasm").is_file() {
        println!("skipped: guests/out/c-thin.wasm is not there");
        return;
    }
    ring_of_two("c-thin", "ring");
}

#[test]
fn comb_is_a_ring_in_one_module() {
    let cluster = Cluster::shared();
    let namespaces = cluster.namespaces(&["-0", "-1", "-2", "-3"]);
    let prefix = namespaces[0].name.trim_end_matches('0');
    let mut setup = Setup::on(cluster);
    let env = [("NR_OPERATORS", "4"), ("NAMESPACE_PREFIX", prefix)];
    setup.guest("comb", "comb", &env, json!({}));
    let mut operator = setup.start();
    for (nonce, start) in [(1, 0), (2, 2), (3, 3)] {
        namespaces[start].set_nonce("object", nonce);
        for namespace in &namespaces {
            namespace.wait_for_nonce("object", nonce);
        }
    }
    operator.stop();
    // What a person sees of it.
    let seen = cluster.kubectl(&["get", "testresources", "--namespace", &namespaces[1].name]);
    let lines: Vec<Vec<_>> = seen
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0][..2], ["NAME", "NONCE"], "{seen}");
    assert_eq!(lines[1][..2], ["object", "3"], "{seen}");
}

#[test]
fn simple_counts_every_change_once_even_when_the_parent_starts_again() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let mut setup = Setup::on(cluster);
    let env = [("IN_NAMESPACE", namespace.name.as_str())];
    setup.guest("simple", "simple", &env, json!({}));
    for name in ["a", "b", "c"] {
        namespace.set_nonce(name, 0);
    }
    let mut operator = setup.start();
    namespace.wait_for_nonce("cluster", 3);
    namespace.set_nonce("a", 5);
    namespace.wait_for_nonce("cluster", 4);
    operator.stop();
    // What happens while nobody looks counts as well: two changes and a new object.
    namespace.set_nonce("b", 1);
    namespace.set_nonce("b", 2);
    namespace.set_nonce("d", 0);
    cluster.delete(&format!("{}/c", namespace.test_resources()));
    let mut operator = setup.start();
    namespace.wait_for_nonce("cluster", 7);
    operator.stop();
    // Everything is reconciled once more; nothing counts but the new object.
    let mut operator = setup.start();
    namespace.set_nonce("e", 0);
    namespace.wait_for_nonce("cluster", 8);
    operator.stop();
    assert_eq!(namespace.nonce("cluster"), Some(8));
}

/// A probe at work in a namespace.
fn probe(setup: &mut Setup, name: &str, probe: &str, namespace: &Namespace, fields: Value) {
    let env = [("PROBE", probe), ("NAMESPACE", namespace.name.as_str())];
    setup.guest(name, "probe", &env, fields);
}

fn start_probe(which: &str, namespace: &Namespace) -> Operator {
    let mut setup = Setup::on(namespace.cluster);
    probe(&mut setup, "probe", which, namespace, json!({}));
    setup.start()
}

#[test]
fn a_requeue_comes_when_it_was_asked_for() {
    let namespace = Cluster::shared().namespace();
    namespace.create_config_map("object", json!({"probe": "requeue"}));
    let _operator = start_probe("requeue", &namespace);
    let times: Vec<u64> = wait_for("four reconciles", PATIENCE, || {
        let data = namespace.data("object-out")?;
        let times = data["times"].as_str()?.split(',');
        let times: Vec<_> = times.map(|t| t.parse().unwrap()).collect();
        (times.len() >= 4).then_some(times)
    });
    for pair in times.windows(2) {
        let gap = pair[1] - pair[0];
        assert!(
            (1_950..5_000).contains(&gap),
            "2 s were asked for: {times:?}"
        );
    }
    // Late is as bad as early, but a busy machine must be forgiven once.
    let gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(
        gaps.iter().min().is_some_and(|gap| *gap < 2_500),
        "{gaps:?}"
    );
}

#[test]
fn a_server_side_apply_that_meets_anothers_field_is_a_conflict() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let path = format!("{}/object", namespace.config_maps());
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "object", "labels": {"probe": "apply"}}, "data": {"key": "mine", "other": "kept"},
    });
    cluster.apply(&path, &object);
    let _operator = start_probe("apply", &namespace);
    let conflict = namespace.wait_for_data("object-conflict");
    let message = conflict["message"].as_str().unwrap();
    assert!(
        message.contains("conflict") && message.contains(r#""test""#),
        "{message}"
    );
    wait_for("the field by force", PATIENCE, || {
        let data = namespace.data("object")?;
        (data == json!({"key": "probe", "other": "kept"})).then_some(())
    });
    let object = cluster.get(&path).unwrap();
    let managers = object["metadata"]["managedFields"].as_array().unwrap();
    assert!(
        managers.iter().any(|m| m["manager"] == "probe"),
        "{managers:?}"
    );
}

#[test]
fn a_long_list_comes_in_pages_and_a_reflector_gets_all_of_it() {
    let namespace = Cluster::shared().namespace();
    let count = namespace.create_config_maps(1_200);
    let _operator = start_probe("list", &namespace);
    let counts = namespace.wait_for_data("list-out");
    let expected = json!({"pages": "3", "listed": count.to_string(), "watched": count.to_string()});
    assert_eq!(counts, expected);
}

#[test]
fn what_a_controller_owns_comes_back() {
    let namespace = Cluster::shared().namespace();
    let _operator = start_probe("owns", &namespace);
    namespace.create_config_map("object", json!({"probe": "owns"}));
    namespace.wait_for_data("object-owned");
    namespace.delete_and_wait_for_another("object-owned");
}

#[test]
fn a_finalizer_holds_an_object_until_it_is_done() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let _operator = start_probe("finalizer", &namespace);
    namespace.create_config_map("object", json!({"probe": "finalizer"}));
    namespace.wait_for_data("object-applied");
    assert_eq!(namespace.data("object-cleaned"), None);
    let path = format!("{}/object", namespace.config_maps());
    cluster.delete(&path);
    namespace.wait_for_data("object-cleaned");
    wait_for("the object's end", PATIENCE, || {
        cluster.get(&path).is_none().then_some(())
    });
}

#[test]
fn an_event_is_published() {
    let namespace = Cluster::shared().namespace();
    let _operator = start_probe("events", &namespace);
    namespace.create_config_map("object", json!({"probe": "events"}));
    namespace.wait_for_event("Probed", "object");
}

#[test]
fn children_that_fail_are_started_again_and_their_neighbour_does_not_notice() {
    let cluster = Cluster::shared();
    let mut setup = Setup::on(cluster);
    let probes = [
        ("panic", "trapped in on_event: unreachable"),
        ("exit", "exited with code 3"),
        (
            "spin",
            "used more than 0.5 s of CPU time in one call of on_event",
        ),
    ]
    .map(|(how, reason)| (how, reason, cluster.namespace()));
    for (how, _, namespace) in &probes {
        let limits = json!({"limits": {"eventSeconds": 0.5}});
        probe(&mut setup, how, how, namespace, limits);
    }
    let (source, target) = (cluster.namespace(), cluster.namespace());
    let env = [
        ("IN_NAMESPACE", source.name.as_str()),
        ("OUT_NAMESPACE", target.name.as_str()),
    ];
    setup.guest("neighbour", "ring-thin", &env, json!({}));
    setup.argument("--workers").argument("1");
    let mut operator = setup.start();
    for (.., namespace) in &probes {
        assert_eq!(namespace.wait_for_data("started")["starts"], "1");
    }
    source.set_nonce("object", 1);
    target.wait_for_nonce("object", 1);
    for (how, _, namespace) in &probes {
        namespace.create_config_map(how, json!({}));
    }
    for (nonce, (how, reason, namespace)) in (2..).zip(&probes) {
        wait_for(&format!("second start of {how}"), PATIENCE, || {
            (namespace.data("started")?["starts"] != "1").then_some(())
        });
        let messages = operator.messages(how);
        let end = messages.iter().find(|m| m.contains("starting again in"));
        assert!(end.is_some_and(|e| e.starts_with(reason)), "{how}: {end:?}");
        source.set_nonce("object", nonce);
        target.wait_for_nonce("object", nonce);
    }
    operator.wait_for_line("as asked");
    assert!(
        !operator
            .messages("neighbour")
            .iter()
            .any(|m| m.contains("starting again")),
        "the neighbour goes on"
    );
    operator.stop();
}

#[test]
fn stop_reaches_a_child_which_then_has_time_to_finish() {
    let namespace = Cluster::shared().namespace();
    let mut operator = start_probe("stop", &namespace);
    namespace.wait_for_data("started");
    assert_eq!(namespace.data("stopped"), None);
    let started = Instant::now();
    operator.stop();
    assert!(
        started.elapsed() < Duration::from_secs(9),
        "not the grace period"
    );
    assert!(
        namespace.data("stopped").is_some(),
        "it has written its last"
    );
    assert_eq!(operator.count("dropped"), 0);
}

#[test]
fn the_grace_period_ends_for_children_that_do_not() {
    let proxy = FaultProxy::to_nowhere();
    let stall = proxy.inject(Fault::Stall, usize::MAX, |_| true);
    let mut waiting = Wat::default();
    let request = waiting.text("GET /api\n\n");
    waiting.on(kind::START, &format!("{request} call $request drop"));

    let mut setup = Setup::through(&proxy);
    setup.module("stubborn", &stubborn(), json!({}));
    setup.module("waiting", &waiting.build(), json!({}));
    setup.module("obedient", &ticking(), json!({}));
    setup.argument("--grace-period").argument("2");
    let mut operator = setup.start();
    stall.wait_for_hits(1);
    operator.wait_for_value("stubborn", "tick");
    operator.wait_for_value("obedient", "tick");
    let started = Instant::now();
    operator.stop();
    let took = started.elapsed();
    assert!((1.9..6.0).contains(&took.as_secs_f64()), "{took:?}");
    let dropped = "did not stop within the grace period, and is dropped";
    assert_eq!(
        operator.messages("waiting"),
        [dropped],
        "its call is not answered"
    );
    assert!(!operator.messages("obedient").iter().any(|m| m == dropped));
}

#[test]
fn a_second_signal_ends_at_once() {
    for (first, second) in [(libc::SIGTERM, libc::SIGINT), (libc::SIGINT, libc::SIGTERM)] {
        let mut setup = Setup::alone();
        setup.module("stubborn", &stubborn(), json!({}));
        setup.argument("--grace-period").argument("600");
        let mut operator = setup.start();
        operator.wait_for_value("stubborn", "tick");
        operator.signal(first);
        operator.wait_for_line("stopping; children have 600 s");
        assert!(operator.is_running());
        operator.signal(second);
        // 128 and the signal's number, as shells have it.
        assert_eq!(operator.wait_exit(PATIENCE).code(), Some(128 + second));
    }
}

/// A Role for TestResources, and its binding to that ServiceAccount.
fn grant(namespace: &Namespace, account: &str, of: &Namespace) {
    let rbac = format!(
        "/apis/rbac.authorization.k8s.io/v1/namespaces/{}",
        namespace.name
    );
    let role = json!({
        "metadata": {"name": account},
        "rules": [{"apiGroups": ["amurant.io"], "resources": ["testresources"], "verbs": ["get", "list", "watch", "create", "update"]}],
    });
    namespace.cluster.create(&format!("{rbac}/roles"), &role);
    let binding = json!({
        "metadata": {"name": account},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": of.name}],
    });
    namespace
        .cluster
        .create(&format!("{rbac}/rolebindings"), &binding);
}

#[test]
fn a_child_has_the_rights_of_its_service_account_and_no_others() {
    let cluster = Cluster::shared();
    for guest in ["ring-thin", "ring", "go-ring"] {
        let (source, target) = (cluster.namespace(), cluster.namespace());
        let account = json!({"metadata": {"name": "worker"}});
        let path = format!("/api/v1/namespaces/{}/serviceaccounts", source.name);
        cluster.create(&path, &account);
        let mut setup = Setup::on(cluster);
        let env = [
            ("IN_NAMESPACE", source.name.as_str()),
            ("OUT_NAMESPACE", target.name.as_str()),
        ];
        let fields = json!({"serviceAccountName": "worker", "namespace": source.name});
        setup.guest("worker", guest, &env, fields);
        source.set_nonce("object", 1);
        let operator = setup.start();
        let forbidden = operator.wait_for("403 in words", |lines| {
            lines.iter().find(|l| l.contains("forbidden")).cloned()
        });
        assert!(forbidden.contains("RBAC"), "{forbidden}");
        assert_eq!(target.nonce("object"), None);
        // Reading first: it must not write yet.
        grant(&source, "worker", &source);
        operator.wait_for("403 for the target", |lines| {
            let of_target = |l: &&String| l.contains("forbidden") && l.contains(&target.name);
            lines.iter().find(of_target).map(|_| ())
        });
        assert_eq!(target.nonce("object"), None);
        grant(&target, "worker", &source);
        target.wait_for_nonce("object", 1);
    }
}
