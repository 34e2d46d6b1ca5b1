//! Watches across everything that happens to them: a fault proxy between parent and API server,
//! and an API server that goes away.
//!
//! Each test runs with `ring-thin`, whose watch is the parent's (`kube_v1.watch`), and with `ring`,
//! whose watch is kube-rs's own over raw requests. Both copy nonces from one namespace to another:
//! a change that is lost is a nonce that never comes.

mod common;

use std::time::Duration;

use common::cluster::{Cluster, Namespace};
use common::fault_proxy::{Fault, FaultProxy, Request};
use common::operator::{Operator, Setup, message};
use common::wat::{Wat, kind};
use serde_json::json;

/// A copier of either kind, behind a proxy.
struct Copier<'a> {
    proxy: FaultProxy,
    source: Namespace<'a>,
    target: Namespace<'a>,
    guest: &'static str,
}

impl Copier<'_> {
    /// Both kinds, one after the other.
    fn each(test: impl Fn(&Copier)) {
        for guest in ["ring-thin", "ring"] {
            println!("with {guest}");
            let cluster = Cluster::shared();
            test(&Copier {
                proxy: FaultProxy::to(cluster),
                source: cluster.namespace(),
                target: cluster.namespace(),
                guest,
            });
        }
    }

    fn start(&self) -> Operator {
        let mut setup = Setup::through(&self.proxy);
        let env = [
            ("IN_NAMESPACE", self.source.name.as_str()),
            ("OUT_NAMESPACE", self.target.name.as_str()),
        ];
        setup.guest(self.guest, self.guest, &env, json!({}));
        setup.start()
    }

    /// Chooses the watches of the source.
    fn watches(&self) -> impl Fn(&Request) -> bool + Send + Sync + 'static {
        let path = format!("{}?", self.source.test_resources());
        move |request| request.is_watch() && request.path.starts_with(&path)
    }

    /// Chooses the listings of the source.
    fn lists(&self) -> impl Fn(&Request) -> bool + Send + Sync + 'static {
        let path = format!("{}?", self.source.test_resources());
        move |request| !request.is_watch() && request.path.starts_with(&path)
    }

    /// Waits until that many watches have begun: what changes from now on, they have to tell.
    fn wait_for_watches(&self, count: usize) {
        self.proxy
            .wait_for_requests("a watch", count, self.watches());
    }

    fn change(&self, nonce: i64) {
        self.source.set_nonce("object", nonce);
    }

    fn arrives(&self, nonce: i64) {
        self.target.wait_for_nonce("object", nonce);
    }
}

#[test]
fn an_answer_in_pieces_of_a_few_bytes_is_put_together() {
    Copier::each(|copier| {
        let split = copier.proxy.inject(Fault::Split, usize::MAX, |_| true);
        copier.change(1);
        let _operator = copier.start();
        copier.arrives(1);
        copier.wait_for_watches(1);
        for nonce in 2..5 {
            copier.change(nonce);
            copier.arrives(nonce);
        }
        assert!(split.hits() > 5, "{}", split.hits());
    });
}

#[test]
fn a_watch_that_breaks_in_the_middle_of_a_line_goes_on_from_there() {
    Copier::each(|copier| {
        let cut = copier
            .proxy
            .inject(Fault::Cut { after: 1 }, 2, copier.watches());
        let _operator = copier.start();
        copier.wait_for_watches(1);
        // One line passes, the next one breaks, and the watch after that begins with it.
        for nonce in 1..=4 {
            copier.change(nonce);
            copier.arrives(nonce);
        }
        assert_eq!(cut.hits(), 2);
        let listings = copier.proxy.requests();
        let listings = listings.iter().filter(|r| copier.lists()(r)).count();
        assert_eq!(listings, 1, "it was not necessary to list again");
    });
}

#[test]
fn a_listing_that_breaks_off_is_made_again() {
    Copier::each(|copier| {
        let cut = copier
            .proxy
            .inject(Fault::Cut { after: 0 }, 2, copier.lists());
        copier.change(1);
        let _operator = copier.start();
        copier.arrives(1);
        assert_eq!(cut.hits(), 2);
    });
}

#[test]
fn a_watch_that_is_too_old_is_followed_by_a_listing() {
    Copier::each(|copier| {
        let cut = copier
            .proxy
            .inject(Fault::Cut { after: 0 }, 1, copier.watches());
        let gone = copier.proxy.inject(Fault::Gone, 1, copier.watches());
        let gone_event = copier.proxy.inject(Fault::GoneEvent, 1, copier.watches());
        let _operator = copier.start();
        copier.wait_for_watches(1);
        // Breaks the first watch; the second one gets HTTP 410, the third one an event that says so.
        copier.change(1);
        copier.arrives(1);
        copier.wait_for_watches(4);
        copier.change(2);
        copier.arrives(2);
        for fault in [cut, gone, gone_event] {
            assert_eq!(fault.hits(), 1);
        }
    });
}

#[test]
fn a_server_that_asks_to_come_back_later_is_obeyed() {
    Copier::each(|copier| {
        let list = copier
            .proxy
            .inject(Fault::TooManyRequests, 1, copier.lists());
        let watch = copier
            .proxy
            .inject(Fault::TooManyRequests, 1, copier.watches());
        let target = format!("{}/", copier.target.test_resources());
        let call = copier.proxy.inject(Fault::TooManyRequests, 2, move |r| {
            r.path.starts_with(&target)
        });
        let _operator = copier.start();
        copier.wait_for_watches(2);
        copier.change(1);
        copier.arrives(1);
        for (fault, hits) in [(list, 1), (watch, 1), (call, 2)] {
            assert_eq!(fault.hits(), hits);
        }
        let target = format!("{}/", copier.target.test_resources());
        let at: Vec<_> = copier
            .proxy
            .requests()
            .iter()
            .filter(|r| r.path.starts_with(&target))
            .map(|r| r.at)
            .collect();
        for pair in at[..3].windows(2) {
            let pause = pair[1] - pair[0];
            assert!(pause >= Duration::from_millis(950), "after {pause:?} only");
        }
    });
}

#[test]
fn calls_that_get_no_answer_delay_nobody_else() {
    Copier::each(|stalled| {
        let cluster = Cluster::shared();
        let (source, target) = (cluster.namespace(), cluster.namespace());
        let path = format!("{}/", stalled.target.test_resources());
        let stall = stalled
            .proxy
            .inject(Fault::Stall, usize::MAX, move |r| r.path.starts_with(&path));
        let mut setup = Setup::through(&stalled.proxy);
        for (name, source, target) in [
            ("stalled", &stalled.source, &stalled.target),
            ("other", &source, &target),
        ] {
            let env = [
                ("IN_NAMESPACE", source.name.as_str()),
                ("OUT_NAMESPACE", target.name.as_str()),
            ];
            setup.guest(name, stalled.guest, &env, json!({}));
        }
        setup.argument("--workers").argument("1");
        stalled.change(1);
        let _operator = setup.start();
        stall.wait_for_hits(1);
        for nonce in 1..4 {
            source.set_nonce("object", nonce);
            target.wait_for_nonce("object", nonce);
        }
        assert_eq!(stalled.target.nonce("object"), None);
        stall.off();
        stalled.arrives(1);
    });
}

/// A guest that watches the ConfigMaps of a namespace and logs what it is told.
fn watcher(namespace: &str) -> Vec<u8> {
    let mut wat = Wat::default();
    let watch = wat.text(
        json!({"version": "v1", "plural": "configmaps", "namespace": namespace, "limit": 2, "labelSelector": "watched=yes"})
            .to_string(),
    );
    wat.on(kind::START, &format!("{watch} call $watch drop"));
    let item = wat.text("item");
    wat.on(
        kind::ITEM,
        &format!("local.get $ptr local.get $len {item} call $say_bytes"),
    );
    let error = wat.text("error");
    wat.on(
        kind::ERROR,
        &format!("local.get $ptr local.get $len {error} call $say_bytes"),
    );
    wat.build()
}

/// What it was told: the type, and the object's name.
fn told(lines: &[String]) -> Vec<(String, String)> {
    let items = lines
        .iter()
        .filter_map(|l| message(l, "watcher")?.strip_prefix("item="));
    items
        .map(|item| {
            let item: serde_json::Value = serde_json::from_str(item).unwrap();
            let name = &item["object"]["metadata"]["name"];
            (
                item["type"].as_str().unwrap().to_owned(),
                name.as_str().unwrap_or_default().to_owned(),
            )
        })
        .collect()
}

#[test]
fn a_typed_watch_tells_every_step_and_a_new_listing_tells_what_has_gone() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let proxy = FaultProxy::to(cluster);
    let cut = proxy.inject(Fault::Cut { after: 3 }, 1, Request::is_watch);
    let gone = proxy.inject(Fault::Gone, 1, Request::is_watch);
    let watched = json!({"watched": "yes"});
    for name in ["a", "b", "c", "d", "e"] {
        namespace.create_config_map(name, watched.clone());
    }
    namespace.create_config_map("not-watched", json!({}));
    let mut setup = Setup::through(&proxy);
    setup.module("watcher", &watcher(&namespace.name), json!({}));
    let operator = setup.start();
    let expect = |expected: &[(&str, &str)], lines: &[String]| {
        let told = told(lines);
        assert!(told.len() <= expected.len(), "{told:?}");
        let same = told
            .iter()
            .zip(expected)
            .all(|((t, n), (et, en))| t == et && n == en);
        assert!(same, "{told:?}");
        (told.len() == expected.len()).then_some(())
    };
    let mut expected = vec![
        ("Init", ""),
        ("InitApply", "a"),
        ("InitApply", "b"),
        ("InitApply", "c"),
        ("InitApply", "d"),
        ("InitApply", "e"),
        ("InitDone", ""),
    ];
    operator.wait_for("three pages", |lines| expect(&expected, lines));
    let lists = proxy.requests();
    let lists = lists.iter().filter(|r| r.path.contains("limit=2")).count();
    assert_eq!(lists, 3);
    proxy.wait_for_requests("the watch", 1, Request::is_watch);
    // Added, changed, and no longer chosen by the selector; then the watch breaks off and is too
    // old to be continued.
    namespace.create_config_map("f", watched.clone());
    let path = namespace.config_maps();
    let change = |name: &str, labels: serde_json::Value| {
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}});
        let path = format!("{path}/{name}");
        let answer = cluster.call("PUT", &path, "application/json", &object);
        assert_eq!(answer.status, 200, "{answer:?}");
    };
    change("a", json!({"watched": "yes", "changed": "yes"}));
    change("b", json!({}));
    expected.extend([("Apply", "f"), ("Apply", "a"), ("Delete", "b")]);
    operator.wait_for("changes", |lines| expect(&expected, lines));
    cluster.delete(&format!("{path}/c"));
    expected.extend([
        ("Init", ""),
        ("InitApply", "a"),
        ("InitApply", "d"),
        ("InitApply", "e"),
        ("InitApply", "f"),
        ("InitDone", ""),
    ]);
    operator.wait_for("a second listing", |lines| expect(&expected, lines));
    assert_eq!((cut.hits(), gone.hits()), (1, 1));
    proxy.wait_for_requests("another watch", 3, Request::is_watch);
    namespace.create_config_map("g", watched);
    expected.push(("Apply", "g"));
    operator.wait_for("the last change", |lines| expect(&expected, lines));
}

#[test]
fn watches_survive_an_api_server_that_stops_and_one_that_is_killed() {
    let Some(cluster) = Cluster::own() else {
        return;
    };
    let mut setup = Setup::on(&cluster);
    let namespaces: Vec<_> = ["ring-thin", "ring", "go-thin", "go-ring"]
        .map(|guest| (guest, cluster.namespace(), cluster.namespace()))
        .into();
    for (guest, source, target) in &namespaces {
        let env = [
            ("IN_NAMESPACE", source.name.as_str()),
            ("OUT_NAMESPACE", target.name.as_str()),
        ];
        setup.guest(guest, guest, &env, json!({}));
    }
    let mut operator = setup.start();
    let travel = |nonce| {
        for (_, source, _) in &namespaces {
            source.set_nonce("object", nonce);
        }
        for (_, _, target) in &namespaces {
            target.wait_for_nonce("object", nonce);
        }
    };
    travel(1);
    for (nonce, end) in [(2, "stop"), (3, "kill")] {
        cluster.command(&format!("{end} kube-apiserver"));
        cluster.command("start kube-apiserver");
        travel(nonce);
    }
    assert!(operator.is_running());
    assert_eq!(operator.count("starting again"), 0, "no child has ended");
    operator.stop();
}
