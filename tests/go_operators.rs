//! Go operators as children: programs on controller-runtime and client-go that know nothing of it,
//! asleep between any two events.

mod common;

use std::time::{Duration, Instant};

use common::cluster::{Cluster, Namespace};
use common::fault_proxy::{Fault, FaultProxy};
use common::operator::{Operator, Setup, message};
use common::{PATIENCE, wait_for};
use serde_json::{Value, json};

/// Asleep whenever there is nothing to do.
fn sleepy() -> Value {
    json!({"idleSeconds": 0.01, "prediction": "never"})
}

/// Has the parent say when children sleep and wake.
fn observed(cluster: &Cluster) -> Setup {
    let mut setup = Setup::on(cluster);
    setup.set("RUST_LOG", "debug,wasmer=error,virtual_fs=error");
    setup
}

fn start_probe(
    probe: &str,
    namespace: &Namespace,
    more: &[(&str, &str)],
    fields: Value,
) -> Operator {
    let mut setup = observed(namespace.cluster);
    add_probe(&mut setup, "probe", probe, namespace, more, fields);
    setup.start()
}

fn add_probe(
    setup: &mut Setup,
    name: &str,
    probe: &str,
    namespace: &Namespace,
    more: &[(&str, &str)],
    fields: Value,
) {
    let mut env = vec![("PROBE", probe), ("NAMESPACE", namespace.name.as_str())];
    env.extend(more);
    setup.guest(name, "go-probe", &env, fields);
}

/// How often a child was woken.
fn wakes(operator: &Operator, child: &str) -> usize {
    let messages = operator.messages(child);
    messages.iter().filter(|m| m.starts_with("woken")).count()
}

/// It had one life, and slept in it.
fn assert_slept(operator: &Operator, child: &str) {
    let messages = operator.messages(child);
    let end = messages.iter().find(|m| m.contains("starting again"));
    assert_eq!(end, None, "{child}");
    assert!(wakes(operator, child) > 0, "{child} has not slept");
}

#[test]
fn go_and_rust_children_form_a_ring_asleep_between_any_two_events() {
    let cluster = Cluster::shared();
    let guests = ["go-ring", "ring", "go-thin", "ring-thin"];
    let namespaces: Vec<_> = guests.iter().map(|_| cluster.namespace()).collect();
    let mut setup = observed(cluster);
    for (index, guest) in guests.iter().enumerate() {
        let target = &namespaces[(index + 1) % guests.len()];
        let env = [
            ("IN_NAMESPACE", namespaces[index].name.as_str()),
            ("OUT_NAMESPACE", target.name.as_str()),
        ];
        setup.guest(guest, guest, &env, sleepy());
    }
    namespaces[0].set_nonce("early", 1);
    let mut operator = setup.start();
    for namespace in &namespaces {
        namespace.wait_for_nonce("early", 1);
    }
    for nonce in 1..=8 {
        let start = nonce as usize % guests.len();
        namespaces[start].set_nonce("late", nonce);
        for namespace in &namespaces {
            namespace.wait_for_nonce("late", nonce);
        }
    }
    operator.stop();
    for guest in guests {
        assert_slept(&operator, guest);
    }
    for guest in ["go-ring", "go-thin"] {
        let ended = operator.messages(guest).pop().unwrap_or_default();
        assert_eq!(ended, "stopped", "{guest}");
    }
}

#[test]
fn a_watch_that_breaks_or_is_too_old_is_begun_anew() {
    let cluster = Cluster::shared();
    let (source, target) = (cluster.namespace(), cluster.namespace());
    let proxy = FaultProxy::to(cluster);
    let faults = [Fault::Cut { after: 0 }, Fault::Gone, Fault::GoneEvent]
        .map(|fault| proxy.inject(fault, 1, |request| request.is_watch()));
    let mut setup = Setup::through(&proxy);
    let env = [
        ("IN_NAMESPACE", source.name.as_str()),
        ("OUT_NAMESPACE", target.name.as_str()),
    ];
    setup.guest("go-ring", "go-ring", &env, sleepy());
    source.set_nonce("object", 1);
    let mut operator = setup.start();
    target.wait_for_nonce("object", 1);
    for fault in &faults {
        fault.wait_for_hits(1);
    }
    source.set_nonce("object", 2);
    target.wait_for_nonce("object", 2);
    operator.stop();
    assert_eq!(operator.count("starting again"), 0);
}

#[test]
fn apply_conflict_and_retry_are_what_client_go_makes_of_them() {
    let cluster = Cluster::shared();
    let (applied, updated) = (cluster.namespace(), cluster.namespace());
    let mut setup = observed(cluster);
    add_probe(&mut setup, "probe", "apply", &applied, &[], sleepy());
    add_probe(&mut setup, "ring", "conflict", &updated, &[], sleepy());
    for (namespace, probe) in [(&applied, "apply"), (&updated, "conflict")] {
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "object", "labels": {"probe": probe}}, "data": {"key": "mine"},
        });
        cluster.apply(&format!("{}/object", namespace.config_maps()), &object);
    }
    let operator = setup.start();
    let message = applied.wait_for_data("object-conflict")["message"].to_string();
    assert!(message.contains("conflict"), "{message}");
    let message = updated.wait_for_data("object-conflict")["message"].to_string();
    assert!(message.contains("has been modified"), "{message}");
    for namespace in [&applied, &updated] {
        wait_for("the field", PATIENCE, || {
            (namespace.data("object")?["key"] == "probe").then_some(())
        });
    }
    assert_slept(&operator, "probe");
    assert_slept(&operator, "ring");
}

#[test]
fn json_may_be_as_deep_as_parsers_allow() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let mut setup = Setup::on(cluster);
    add_probe(&mut setup, "probe", "deep", &namespace, &[], sleepy());
    let _operator = setup.start();
    namespace.create_config_map("object", json!({"probe": "deep"}));
    assert_eq!(namespace.wait_for_data("object-out")["depth"], "10000");
}

#[test]
fn what_a_controller_owns_comes_back_and_a_finalizer_holds() {
    let cluster = Cluster::shared();
    let (owner, finalized) = (cluster.namespace(), cluster.namespace());
    let mut setup = observed(cluster);
    add_probe(&mut setup, "probe", "owns", &owner, &[], sleepy());
    add_probe(&mut setup, "ring", "finalizer", &finalized, &[], sleepy());
    let operator = setup.start();
    owner.create_config_map("object", json!({"probe": "owns"}));
    finalized.create_config_map("object", json!({"probe": "finalizer"}));

    owner.wait_for_data("object-owned");
    owner.delete_and_wait_for_another("object-owned");

    finalized.wait_for_data("object-applied");
    assert_eq!(finalized.data("object-cleaned"), None);
    let object = format!("{}/object", finalized.config_maps());
    cluster.delete(&object);
    finalized.wait_for_data("object-cleaned");
    wait_for("the object's end", PATIENCE, || {
        cluster.get(&object).is_none().then_some(())
    });
    assert_slept(&operator, "probe");
    assert_slept(&operator, "ring");
}

#[test]
fn an_event_is_recorded_and_the_informers_of_client_go_see_what_happens() {
    let cluster = Cluster::shared();
    let (recorded, informed) = (cluster.namespace(), cluster.namespace());
    let mut setup = observed(cluster);
    add_probe(&mut setup, "probe", "events", &recorded, &[], sleepy());
    add_probe(&mut setup, "ring", "informer", &informed, &[], sleepy());
    let operator = setup.start();
    recorded.create_config_map("object", json!({"probe": "events"}));
    recorded.wait_for_event("Probed", "object");
    let seen = |names: &str| {
        wait_for(names, PATIENCE, || {
            (informed.data("informer-out")?["names"] == names).then_some(())
        });
    };
    informed.create_config_map("a", json!({"probe": "informer"}));
    seen("a");
    informed.create_config_map("b", json!({"probe": "informer"}));
    seen("a,b");
    cluster.delete(&format!("{}/a", informed.config_maps()));
    seen("b");
    assert_slept(&operator, "probe");
    assert_slept(&operator, "ring");
}

#[test]
fn two_thousand_objects_come_through_every_kind_of_client() {
    let namespace = Cluster::shared().namespace();
    let count = namespace.create_config_maps(2_000);
    let _operator = start_probe("list", &namespace, &[], sleepy());
    let pages = format!("{count} in {} pages", count.div_ceil(500));
    let expected = json!({"typed": pages, "unstructured": pages, "metadata": pages, "cached": count.to_string()});
    assert_eq!(namespace.wait_for_data("list-out"), expected);
}

/// Times in ms that a probe has written.
fn times(namespace: &Namespace, count: usize) -> Vec<u64> {
    wait_for("the times", PATIENCE, || {
        let data = namespace.data("object-out")?;
        let times = data["times"].as_str()?.split(',');
        let times: Vec<_> = times.map(|t| t.parse().unwrap()).collect();
        (times.len() >= count).then_some(times)
    })
}

#[test]
fn deadlines_are_kept_while_their_child_sleeps_with_both_kinds_of_queue() {
    let cluster = Cluster::shared();
    let queues =
        ["priority", "classic"].map(|queue| (queue, cluster.namespace(), cluster.namespace()));
    let mut setup = observed(cluster);
    for (queue, requeued, retried) in &queues {
        requeued.create_config_map("object", json!({"probe": "requeue"}));
        retried.create_config_map("object", json!({"probe": "retry"}));
        let more = [("QUEUE", *queue)];
        add_probe(&mut setup, queue, "requeue", requeued, &more, sleepy());
        add_probe(
            &mut setup,
            &format!("{queue}-retry"),
            "retry",
            retried,
            &more,
            sleepy(),
        );
    }
    let operator = setup.start();
    for (queue, requeued, retried) in &queues {
        let times = times(requeued, 6);
        let late: Vec<_> = times
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).checked_sub(2_000))
            .collect();
        assert!(
            late.iter().all(Option::is_some),
            "{queue} came early: {times:?}"
        );
        // 2 s after the end of a reconcile, which takes some ms. A busy machine is forgiven, but what
        // the queue itself adds would be there every time.
        let best = late.iter().flatten().min().unwrap();
        assert!(*best < 50, "{queue} is late: {times:?}");
        // 5, 10 and 20 ms after a failure.
        self::times(retried, 1);
        assert_slept(&operator, queue);
    }
}

#[test]
fn an_idle_operator_sleeps_for_a_minute_with_both_kinds_of_queue() {
    let cluster = Cluster::shared();
    let queues = ["priority", "classic"].map(|queue| (queue, cluster.namespace()));
    let mut setup = observed(cluster);
    for (queue, namespace) in &queues {
        add_probe(
            &mut setup,
            queue,
            "idle",
            namespace,
            &[("QUEUE", queue)],
            sleepy(),
        );
    }
    let operator = setup.start();
    for (queue, namespace) in &queues {
        namespace.create_config_map("object", json!({"probe": "idle"}));
        namespace.wait_for_data("object-seen");
        operator.wait_for(&format!("{queue} to sleep"), |lines| {
            let own: Vec<_> = lines.iter().filter_map(|l| message(l, queue)).collect();
            own.iter()
                .any(|m| m.starts_with("hibernated"))
                .then_some(())
        });
    }
    // Nothing to wait for: that nothing happens takes its time. Each has what it did last behind it
    // after a few seconds.
    let watch = |seconds| {
        let before = queues.each_ref().map(|(queue, _)| wakes(&operator, queue));
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(seconds) {
            std::thread::sleep(Duration::from_millis(200));
        }
        let after = queues.each_ref().map(|(queue, _)| wakes(&operator, queue));
        [after[0] - before[0], after[1] - before[1]]
    };
    watch(5);
    let woken = watch(75);
    assert!(woken.iter().all(|count| *count <= 1), "{woken:?} wakes");
}

#[test]
fn go_programs_that_fail_are_started_again_and_their_neighbour_does_not_notice() {
    let cluster = Cluster::shared();
    let mut setup = Setup::on(cluster);
    let probes = [
        (
            "panic",
            "trapped in on_event: unreachable",
            "panic: as asked",
        ),
        ("exit", "exited with code 3", ""),
        (
            "spin",
            "used more than 1 s of CPU time in one call of on_event",
            "",
        ),
        ("grow", "trapped in on_event: unreachable", "out of memory"),
        ("recurse", "trapped in on_event: call stack exhausted", ""),
    ]
    .map(|probe| (probe, cluster.namespace()));
    for ((how, ..), namespace) in &probes {
        let fields = json!({"limits": {"eventSeconds": 1, "memory": "128Mi"}});
        add_probe(&mut setup, how, how, namespace, &[], fields);
    }
    let (source, target) = (cluster.namespace(), cluster.namespace());
    let env = [
        ("IN_NAMESPACE", source.name.as_str()),
        ("OUT_NAMESPACE", target.name.as_str()),
    ];
    setup.guest("neighbour", "go-thin", &env, json!({}));
    let mut operator = setup.start();
    for (_, namespace) in &probes {
        assert_eq!(namespace.wait_for_data("started")["starts"], "1");
    }
    for (nonce, ((how, reason, said), namespace)) in (1..).zip(&probes) {
        namespace.create_config_map(how, json!({}));
        let end = operator.wait_for(&format!("the end of {how}"), |lines| {
            let mut own = lines.iter().filter_map(|l| message(l, how));
            own.find(|m| m.contains("starting again in"))
                .map(str::to_owned)
        });
        assert!(end.starts_with(reason), "{how}: {end}");
        let messages = operator.messages(how);
        assert!(
            messages.iter().any(|m| m.contains(said)),
            "{how}: {messages:?}"
        );
        source.set_nonce("object", nonce);
        target.wait_for_nonce("object", nonce);
    }
    assert!(
        !operator
            .messages("neighbour")
            .iter()
            .any(|m| m.contains("starting again"))
    );
    operator.stop();
}

#[test]
fn stop_is_a_sigterm_and_leaves_time_to_finish() {
    let namespace = Cluster::shared().namespace();
    let mut operator = start_probe("stop", &namespace, &[], sleepy());
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
