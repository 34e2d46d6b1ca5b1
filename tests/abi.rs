//! What `docs/abi.md` promises a guest, checked by guests that use nothing else.

mod common;

use std::fmt::Write;
use std::sync::Arc;

use common::cluster::Cluster;
use common::fault_proxy::{Fault, FaultProxy, Request};
use common::operator::{Operator, Setup, message};
use common::wat::{Wat, kind, ticking};
use serde_json::{Value, json};

/// Stands for captured text in a request.
const CAPTURED: char = '\u{1}';

/// A guest that makes calls one after the other and logs what it gets.
#[derive(Default)]
struct Script {
    steps: Vec<Step>,
}

struct Step {
    verb: &'static str,
    request: String,
    capture: Option<String>,
}

/// The events of one step: kind and payload.
type Events = Vec<(u32, String)>;

impl Script {
    fn typed(&mut self, verb: &'static str, descriptor: Value) -> &mut Self {
        self.step(verb, descriptor.to_string())
    }

    fn raw(&mut self, request: &str) -> &mut Self {
        self.step("request", request.to_owned())
    }

    fn step(&mut self, verb: &'static str, request: String) -> &mut Self {
        self.steps.push(Step {
            verb,
            request: request.replace("\\u0001", "\u{1}"),
            capture: None,
        });
        self
    }

    /// Keeps what stands between that text and the next quotation mark in the last step's answer.
    fn capture(&mut self, after: &str) -> &mut Self {
        self.steps.last_mut().unwrap().capture = Some(after.to_owned());
        self
    }

    fn module(&self) -> Vec<u8> {
        let mut wat = Wat::default();
        let mut run = String::from("(func $run");
        for (number, step) in self.steps.iter().enumerate() {
            write!(run, "\nglobal.get $step i32.const {number} i32.eq if ").unwrap();
            for (index, part) in step.request.split(CAPTURED).enumerate() {
                if index > 0 {
                    run.push_str("i32.const 256 global.get $captured call $put ");
                }
                write!(run, "{} call $put ", wat.text(part)).unwrap();
            }
            write!(
                run,
                "i32.const 65536 global.get $at i32.const 65536 i32.sub i32.const 65536 global.set $at call ${} global.set $current end",
                step.verb
            )
            .unwrap();
        }
        let done = wat.say("done");
        write!(
            run,
            "\nglobal.get $step i32.const {} i32.eq if {done} end)",
            self.steps.len()
        )
        .unwrap();
        let mut capture =
            String::from("(func $capture (param $ptr i32) (param $len i32) (local $i i32)");
        for (number, step) in self.steps.iter().enumerate() {
            let Some(after) = &step.capture else { continue };
            let after = wat.text(after);
            write!(
                capture,
                "\nglobal.get $step i32.const {number} i32.eq if
                local.get $ptr local.get $len {after} call $find local.set $i
                i32.const 0 global.set $captured
                loop
                  i32.const 256 global.get $captured i32.add local.get $i i32.load8_u i32.store8
                  global.get $captured i32.const 1 i32.add global.set $captured
                  local.get $i i32.const 1 i32.add local.tee $i i32.load8_u i32.const 34 i32.ne br_if 0
                end end"
            )
            .unwrap();
        }
        capture.push(')');
        wat.functions(
            "(global $step (mut i32) (i32.const 0)) (global $current (mut i64) (i64.const 0)) (global $captured (mut i32) (i32.const 0))",
        );
        wat.functions(&run).functions(&capture);
        wat.on(kind::START, "call $run");
        wat.on_any(
            "local.get $op i64.eqz br_if 0
            local.get $op global.get $current i64.ne if unreachable end
            global.get $step i64.extend_i32_u call $put_number i32.const 32 call $put_byte
            local.get $kind i64.extend_i32_u call $put_number i32.const 61 call $put_byte
            local.get $ptr local.get $len call $put call $flush",
        );
        for last in [kind::RESULT, kind::END, kind::ERROR] {
            wat.on(
                last,
                "local.get $ptr local.get $len call $capture
                global.get $step i32.const 1 i32.add global.set $step call $run",
            );
        }
        wat.build()
    }

    /// Runs the script in a child with these fields; the events of each step.
    fn run(&self, mut setup: Setup, fields: Value) -> Vec<Events> {
        setup.module("script", &self.module(), fields);
        let operator = setup.start();
        operator.wait_for_line("script       done");
        let mut steps = vec![Events::new(); self.steps.len()];
        for line in operator.messages("script") {
            let parsed = line.split_once('=').and_then(|(key, payload)| {
                let (step, kind) = key.split_once(' ')?;
                Some((step.parse::<usize>().ok()?, kind.parse().ok()?, payload))
            });
            if let Some((step, kind, payload)) = parsed {
                // The API server's JSON ends with a line feed, which the log escapes.
                let payload = payload.strip_suffix("\\n").unwrap_or(payload);
                steps[step].push((kind, payload.to_owned()));
            }
        }
        steps
    }
}

/// The answer of a typed step, which must be the only event.
fn result(events: &Events) -> Value {
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0].0, kind::RESULT, "{events:?}");
    serde_json::from_str(&events[0].1).unwrap_or_else(|e| panic!("{e}: {events:?}"))
}

/// Code and reason of the failure of a step.
fn failure(events: &Events) -> (u64, String) {
    let (kind, payload) = events.last().unwrap();
    assert_eq!(*kind, kind::ERROR, "{events:?}");
    let status: Value = serde_json::from_str(payload).unwrap();
    assert_eq!(status["kind"], "Status");
    assert_eq!(status["status"], "Failure");
    assert!(
        status["message"].as_str().is_some_and(|m| !m.is_empty()),
        "{status}"
    );
    (
        status["code"].as_u64().unwrap(),
        status["reason"].as_str().unwrap_or_default().to_owned(),
    )
}

fn failed(events: &Events, code: u64, reason: &str) {
    assert_eq!(failure(events), (code, reason.to_owned()), "{events:?}");
}

/// A descriptor: `base` with more fields.
fn with(base: &Value, more: Value) -> Value {
    let mut descriptor = base.clone();
    let fields = descriptor.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    descriptor
}

#[test]
fn the_typed_verbs_do_what_the_api_server_offers() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let maps = json!({"version": "v1", "plural": "configmaps", "namespace": namespace.name});
    let a = with(&maps, json!({"name": "a"}));
    let b = with(&maps, json!({"name": "b"}));
    let new = |name: &str| json!({"metadata": {"name": name}, "data": {"key": "1"}});
    let apply = |manager: &str, value: &str| {
        json!({
            "patchType": "apply", "fieldManager": manager,
            "body": {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "b"}, "data": {"key": value}},
        })
    };
    let mut script = Script::default();
    let steps: Vec<(&'static str, Value)> = vec![
        (
            "create",
            with(&maps, json!({"body": new("a"), "fieldManager": "script"})),
        ),
        ("create", with(&maps, json!({"body": new("a")}))),
        ("get", a.clone()),
        ("get", with(&maps, json!({"name": "missing"}))),
        (
            "patch",
            with(
                &a,
                json!({"patchType": "merge", "body": {"data": {"key": null, "merged": "yes"}}}),
            ),
        ),
        (
            "patch",
            with(
                &a,
                json!({"patchType": "json", "body": [{"op": "test", "path": "/data/merged", "value": "yes"}, {"op": "add", "path": "/data/json", "value": "yes"}]}),
            ),
        ),
        (
            "patch",
            with(
                &a,
                json!({"patchType": "json", "body": [{"op": "test", "path": "/data/merged", "value": "no"}]}),
            ),
        ),
        (
            "patch",
            with(
                &a,
                json!({"patchType": "strategic", "body": {"metadata": {"labels": {"strategic": "yes"}}}}),
            ),
        ),
        ("patch", with(&b, apply("one", "1"))),
        ("patch", with(&b, apply("two", "2"))),
        (
            "patch",
            with(&with(&b, apply("two", "2")), json!({"force": true})),
        ),
        (
            "replace",
            with(
                &a,
                json!({"body": {"metadata": {"name": "a"}, "data": {"replaced": "yes"}}}),
            ),
        ),
        (
            "replace",
            with(
                &a,
                json!({"body": {"metadata": {"name": "a", "resourceVersion": "1"}}}),
            ),
        ),
        (
            "create",
            with(&maps, json!({"body": new("dry"), "dryRun": true})),
        ),
        ("get", with(&maps, json!({"name": "dry"}))),
        ("get", with(&a, json!({"resourceVersion": "0"}))),
        (
            "delete",
            with(&a, json!({"body": {"preconditions": {"uid": "another"}}})),
        ),
        ("delete", a.clone()),
        ("get", a.clone()),
        ("delete", a.clone()),
        (
            "get",
            json!({"group": "nobody.example", "version": "v1", "plural": "nothings", "name": "x"}),
        ),
        ("watch", with(&maps, json!({"labelSelector": "a in"}))),
    ];
    for (verb, descriptor) in steps {
        script.typed(verb, descriptor);
    }
    let steps = script.run(Setup::on(cluster), json!({}));
    let mut steps = steps.iter();
    let mut next = || steps.next().unwrap();

    assert_eq!(
        result(next())["metadata"]["managedFields"][0]["manager"],
        "script"
    );
    failed(next(), 409, "AlreadyExists");
    assert_eq!(result(next())["data"], json!({"key": "1"}));
    failed(next(), 404, "NotFound");
    assert_eq!(result(next())["data"], json!({"merged": "yes"}));
    assert_eq!(
        result(next())["data"],
        json!({"merged": "yes", "json": "yes"})
    );
    failed(next(), 422, "Invalid");
    assert_eq!(
        result(next())["metadata"]["labels"],
        json!({"strategic": "yes"})
    );
    assert_eq!(result(next())["data"], json!({"key": "1"}));
    failed(next(), 409, "Conflict");
    assert_eq!(result(next())["data"], json!({"key": "2"}));
    assert_eq!(result(next())["data"], json!({"replaced": "yes"}));
    failed(next(), 409, "Conflict");
    assert_eq!(result(next())["metadata"]["name"], "dry");
    failed(next(), 404, "NotFound");
    assert_eq!(result(next())["data"], json!({"replaced": "yes"}));
    failed(next(), 409, "Conflict");
    assert_eq!(result(next())["status"], "Success");
    failed(next(), 404, "NotFound");
    failed(next(), 404, "NotFound");
    // The answer is no `Status`: the parent makes one in its form.
    failed(next(), 404, "NotFound");
    let watch = next();
    failed(watch, 400, "BadRequest");
    assert_eq!(watch[0].0, kind::ITEM, "`Init` comes first");
}

#[test]
fn a_list_comes_in_pages_by_limit_and_continue() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    for name in ["a", "b", "c", "d", "e"] {
        namespace.create_config_map(
            name,
            json!({"even": (name == "b" || name == "d").to_string()}),
        );
    }
    // Those of the cluster itself have no label.
    let maps = json!({"version": "v1", "plural": "configmaps", "namespace": namespace.name, "labelSelector": "even", "limit": 2});
    let next = with(&maps, json!({"continue": CAPTURED.to_string()}));
    let mut script = Script::default();
    script
        .typed("list", maps.clone())
        .capture(r#""continue":""#);
    script
        .typed("list", next.clone())
        .capture(r#""continue":""#);
    script.typed("list", next);
    script.typed(
        "list",
        with(
            &maps,
            json!({"labelSelector": "even in (true)", "limit": 100}),
        ),
    );
    script.typed(
        "list",
        with(&maps, json!({"fieldSelector": "metadata.name=c"})),
    );
    script.typed("list", with(&maps, json!({"continue": "nonsense"})));
    let steps = script.run(Setup::on(cluster), json!({}));
    let names = |events: &Events| -> String {
        let list = result(events);
        assert_eq!(list["kind"], "ConfigMapList");
        let items = list["items"].as_array().unwrap().iter();
        items
            .map(|i| i["metadata"]["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(&steps[0]), "ab");
    assert_eq!(names(&steps[1]), "cd");
    assert_eq!(names(&steps[2]), "e");
    assert_eq!(
        result(&steps[2])["metadata"].get("continue"),
        None,
        "the last page"
    );
    assert_eq!(names(&steps[3]), "bd");
    assert_eq!(names(&steps[4]), "c");
    assert_eq!(failure(&steps[5]).0, 400);
}

#[test]
fn the_status_of_a_custom_resource_is_a_subresource() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let crd = br#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.test.amurant.io}
spec:
  group: test.amurant.io
  scope: Namespaced
  names: {kind: Thing, plural: things}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"#;
    cluster.install_crd(crd, "/apis/test.amurant.io/v1/things");
    let things = json!({"group": "test.amurant.io", "version": "v1", "plural": "things", "namespace": namespace.name});
    let thing = |spec: i64, status: i64| {
        json!({
            "apiVersion": "test.amurant.io/v1", "kind": "Thing", "metadata": {"name": "a"},
            "spec": {"value": spec}, "status": {"value": status},
        })
    };
    let a = with(&things, json!({"name": "a"}));
    let status = with(&a, json!({"subresource": "status"}));
    let mut script = Script::default();
    script.typed("create", with(&things, json!({"body": thing(1, 1)})));
    script.typed(
        "patch",
        with(&status, json!({"patchType": "merge", "body": thing(2, 2)})),
    );
    script.typed("patch", with(&status, json!({"patchType": "apply", "fieldManager": "script", "force": true, "body": thing(3, 3)})));
    script.typed(
        "patch",
        with(&a, json!({"patchType": "merge", "body": thing(4, 4)})),
    );
    script.typed("get", status.clone());
    script.typed("get", with(&a, json!({"subresource": "scale"})));
    let steps = script.run(Setup::on(cluster), json!({}));
    let values = |events: &Events| {
        let thing = result(events);
        (
            thing["spec"]["value"].as_i64(),
            thing["status"]["value"].as_i64(),
        )
    };
    assert_eq!(values(&steps[0]), (Some(1), None));
    assert_eq!(values(&steps[1]), (Some(1), Some(2)));
    assert_eq!(values(&steps[2]), (Some(1), Some(3)));
    assert_eq!(values(&steps[3]), (Some(4), Some(3)));
    assert_eq!(values(&steps[4]), (Some(4), Some(3)));
    assert_eq!(failure(&steps[5]).0, 404);
}

#[test]
fn a_raw_request_is_answered_by_head_data_and_end() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let path = namespace.config_maps();
    let mut script = Script::default();
    script.raw(&format!("POST http://kubernetes.default{path}?fieldManager=raw\ncontent-type: application/json\n\n{{\"metadata\":{{\"name\":\"a\"}},\"data\":{{\"key\":\"1\"}}}}"));
    script.raw(&format!("GET {path}/a\naccept: application/yaml\n\n"));
    script.raw(&format!("GET {path}/missing\n\n"));
    script.raw(&format!("DELETE {path}/a\n\n"));
    script.raw("GET /version\n\n");
    let steps = script.run(Setup::on(cluster), json!({}));
    let parts = |events: &Events| {
        let (head, rest) = events.split_first().unwrap();
        let (end, data) = rest.split_last().unwrap();
        assert_eq!((head.0, end.0, end.1.as_str()), (kind::HEAD, kind::END, ""));
        assert!(data.iter().all(|(k, _)| *k == kind::DATA));
        let body: String = data.iter().map(|(_, part)| part.as_str()).collect();
        (head.1.clone(), body)
    };
    for (step, status, content_type, part) in [
        (0, 201, "application/json", r#""manager":"raw""#),
        (1, 200, "application/yaml", "kind: ConfigMap"),
        (2, 404, "application/json", r#""reason":"NotFound""#),
        (3, 200, "application/json", r#""status":"Success""#),
        (4, 200, "application/json", r#""gitVersion":"#),
    ] {
        let (head, body) = parts(&steps[step]);
        // Line feeds are escaped in the log.
        assert!(head.starts_with(&format!("{status}\\n")), "{head}");
        assert!(
            head.contains(&format!("\\ncontent-type: {content_type}\\n")),
            "{head}"
        );
        assert!(body.replace(": \"", ":\"").contains(part), "{body}");
    }
}

#[test]
fn a_child_cannot_say_that_it_is_somebody_else() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let review = r#"{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}"#;
    let mut script = Script::default();
    for header in [
        "accept: application/json",
        "impersonate-user: system:admin",
        "Impersonate-Group: system:masters",
        "authorization: Bearer nonsense",
        "x-remote-user: system:admin",
        "Impersonate-Uid: 1",
        "impersonate-extra-a: b",
        "host: example.org",
        "content-length: 3",
        "connection: impersonate-user",
    ] {
        script.raw(&format!("POST /apis/authentication.k8s.io/v1/selfsubjectreviews\n{header}\ncontent-type: application/json\n\n{review}"));
    }
    let fields = json!({"serviceAccountName": "worker", "namespace": namespace.name});
    for events in script.run(Setup::on(cluster), fields) {
        let (_, body) = events.iter().find(|(k, _)| *k == kind::DATA).unwrap();
        let review: Value = serde_json::from_str(body).unwrap();
        let user = &review["status"]["userInfo"];
        let expected = format!("system:serviceaccount:{}:worker", namespace.name);
        assert_eq!(user["username"], expected, "{events:?}");
        let mut groups: Vec<_> = user["groups"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        groups.sort_unstable();
        let of_namespace = format!("system:serviceaccounts:{}", namespace.name);
        assert_eq!(
            groups,
            [
                "system:authenticated",
                "system:serviceaccounts",
                &of_namespace
            ]
        );
        assert_eq!(user.get("extra"), None, "{user}");
    }
}

#[test]
fn an_answer_that_does_not_come_or_is_too_large_is_a_failure_with_code_0() {
    let mut script = Script::default();
    script.typed(
        "get",
        json!({"version": "v1", "plural": "configmaps", "name": "a"}),
    );
    script.raw("GET /api\n\n");
    let steps = script.run(Setup::alone(), json!({}));
    for events in steps {
        failed(&events, 0, "ConnectionFailed");
        assert_eq!(events.len(), 1);
    }
    let proxy = FaultProxy::to_nowhere();
    proxy.inject(Fault::Canned(vec![b' '; (16 << 20) + 1].into()), 1, |_| {
        true
    });
    proxy.inject(Fault::Cut { after: 0 }, 1, |_| true);
    let steps = script.run(Setup::through(&proxy), json!({}));
    failed(&steps[0], 0, "TooLarge");
    // A body that breaks off: the head has come by then.
    assert_eq!(steps[1][0].0, kind::HEAD);
    failed(&steps[1], 0, "ConnectionFailed");
}

/// A guest that makes one raw request and says of each `data` event how long it is, and whether it
/// ends a line.
fn measuring(path: &str) -> Vec<u8> {
    let mut wat = Wat::default();
    let request = wat.text(format!("GET {path}\n\n"));
    wat.on(kind::START, &format!("{request} call $request drop"));
    let data = wat.text("data");
    wat.on(
        kind::DATA,
        &format!(
            "{data} call $put i32.const 61 call $put_byte local.get $len i64.extend_i32_u call $put_number
            i32.const 32 call $put_byte
            local.get $ptr local.get $len i32.add i32.const 1 i32.sub i32.load8_u i64.extend_i32_u call $put_number call $flush"
        ),
    );
    let end = wat.say("end");
    wat.on(kind::END, &end);
    wat.build()
}

/// Length and last byte of each `data` event.
fn measured(operator: &Operator) -> Vec<(usize, u8)> {
    operator.wait_for("the end", |lines| {
        lines
            .iter()
            .any(|l| message(l, "measuring") == Some("end"))
            .then_some(())
    });
    let messages = operator.messages("measuring");
    let data = messages
        .iter()
        .filter_map(|m| m.strip_prefix("data=")?.split_once(' '));
    data.map(|(length, last)| (length.parse().unwrap(), last.parse().unwrap()))
        .collect()
}

#[test]
fn a_long_body_comes_in_events_of_at_most_64_kib() {
    const BYTES: usize = 1_000_003;
    let proxy = FaultProxy::to_nowhere();
    proxy.inject(Fault::Canned(vec![b'x'; BYTES].into()), 1, |_| true);
    let mut setup = Setup::through(&proxy);
    setup.module("measuring", &measuring("/long"), json!({}));
    let data = measured(&setup.start());
    assert_eq!(data.iter().map(|(length, _)| length).sum::<usize>(), BYTES);
    assert!(
        data.iter().all(|(length, _)| (1..=65_536).contains(length)),
        "{data:?}"
    );
}

#[test]
fn a_raw_watch_comes_in_whole_lines_except_for_very_long_ones() {
    let mut lines: Vec<Vec<u8>> = (1..60).map(|i| vec![b'x'; i * 97]).collect();
    lines.insert(30, vec![b'y'; 150_000]);
    let body: Vec<u8> = lines
        .iter()
        .flat_map(|l| [l.as_slice(), b"\n"].concat())
        .collect();
    for split in [0, usize::MAX] {
        let proxy = FaultProxy::to_nowhere();
        proxy.inject(Fault::Split, split, |_| true);
        proxy.inject(Fault::Canned(Arc::new(body.clone())), 1, Request::is_watch);
        let mut setup = Setup::through(&proxy);
        setup.module("measuring", &measuring("/lines?watch=1"), json!({}));
        let data = measured(&setup.start());
        assert_eq!(
            data.iter().map(|(length, _)| length).sum::<usize>(),
            body.len()
        );
        assert!(data.iter().all(|(length, _)| *length <= 65_536), "{data:?}");
        // All that does not end a line is of the long one.
        let pieces: Vec<_> = data.iter().filter(|(_, last)| *last != b'\n').collect();
        assert!(pieces.iter().all(|(_, last)| *last == b'y'), "{data:?}");
        assert!((2..=8).contains(&pieces.len()), "{data:?}");
    }
}

/// Logs each event as `KIND OPERATION LENGTH`.
const TRACE: &str = "local.get $kind i64.extend_i32_u call $put_number i32.const 32 call $put_byte
    local.get $op call $put_number i32.const 32 call $put_byte
    local.get $len i64.extend_i32_u call $put_number call $flush\n";

/// Waits until the neighbour has ticked that often: a tenth of a second each.
fn wait_for_ticks(operator: &Operator, ticks: usize) {
    operator.wait_for("ticks", |lines| {
        let now = lines.iter().filter_map(|l| message(l, "neighbour")).count();
        (now >= ticks).then_some(())
    });
}

#[test]
fn start_comes_first_and_stop_last_and_payloads_only_where_there_are_some() {
    let mut wat = Wat::default();
    wat.wasi("proc_exit", "(param i32)");
    wat.functions("(global $allocs (mut i32) (i32.const 0))");
    wat.alloc("global.get $allocs i32.const 1 i32.add global.set $allocs i32.const 131072");
    let allocs = wat.say32("allocs");
    let (initialized, request) = (wat.say("initialized"), wat.text("GET /api\n\n"));
    wat.initialize(&initialized);
    wat.on_any(TRACE);
    let number = wat.say64("operation");
    wat.on(kind::START, &format!("{request} call $request {number}"));
    wat.on(kind::ERROR, "i64.const 1000000 call $timer drop");
    wat.on(kind::TIMER, &format!("global.get $allocs {allocs}"));
    wat.on(kind::STOP, "i32.const 0 call $proc_exit unreachable");
    let mut setup = Setup::alone();
    setup.module("child", &wat.build(), json!({}));
    let mut operator = setup.start();
    operator.wait_for_value("child", "allocs");
    operator.stop();
    let messages = operator.messages("child");
    let error = &messages[3];
    assert!(
        error.starts_with("9 1 ") && error != "9 1 0",
        "{messages:?}"
    );
    assert_eq!(
        messages,
        [
            "initialized",
            "1 0 0",
            "operation=1",
            error,
            "3 0 0",
            "allocs=1",
            "2 0 0"
        ]
    );
}

#[test]
fn a_command_module_begins_in_start() {
    let wasm = wat::parse_str(
        r#"(module
            (import "host_v1" "log" (func $log (param i32 i32 i32) (result i32)))
            (memory (export "memory") 1)
            (data (i32.const 0) "began=yesevent=yes")
            (func (export "_start") (drop (call $log (i32.const 3) (i32.const 0) (i32.const 9))))
            (func (export "alloc") (param i32) (result i32) unreachable)
            (func (export "on_event") (param i64 i32 i32 i32)
                (drop (call $log (i32.const 3) (i32.const 9) (i32.const 9)))))"#,
    );
    let mut setup = Setup::alone();
    setup.module("command", &wasm.unwrap(), json!({}));
    let mut operator = setup.start();
    operator.wait_for_value("command", "event");
    assert_eq!(operator.messages("command"), ["began=yes", "event=yes"]);
    // It has nothing to do, and need not say that it is done.
    operator.stop();
    assert_eq!(operator.messages("command").len(), 3, "one more event");
}

#[test]
fn a_deadline_comes_once_and_every_event_drops_it() {
    let mut setup = Setup::alone();
    let now = "i32.const 1 i64.const 0 i32.const 0 call $clock_time_get drop i32.const 0 i64.load";
    let timers = |wat: &mut Wat, at_start: &str| {
        wat.wasi("clock_time_get", "(param i32 i64 i32) (result i32)");
        wat.functions("(global $began (mut i64) (i64.const 0))");
        let after = wat.say64("after");
        wat.on_any(TRACE);
        wat.on(kind::START, &format!("{now} global.set $began {at_start}"));
        wat.on(
            kind::TIMER,
            &format!("{now} global.get $began i64.sub {after}"),
        );
    };
    // The latest call counts.
    let mut once = Wat::default();
    timers(
        &mut once,
        "i64.const 3600000000000 call $timer drop i64.const 200000000 call $timer drop",
    );
    let mut never = Wat::default();
    timers(
        &mut never,
        "i64.const 200000000 call $timer drop i64.const -1 call $timer drop",
    );
    // The answer of the request, a failure, comes long before the deadline.
    let mut dropped = Wat::default();
    let request = dropped.text("GET /api\n\n");
    timers(
        &mut dropped,
        &format!("i64.const 800000000 call $timer drop {request} call $request drop"),
    );
    for (name, wat) in [("once", &once), ("never", &never), ("dropped", &dropped)] {
        setup.module(name, &wat.build(), json!({}));
    }
    setup.module("neighbour", &ticking(), json!({}));
    let operator = setup.start();
    let after: u64 = operator.wait_for_value("once", "after").parse().unwrap();
    assert!((200_000_000..5_000_000_000).contains(&after), "{after}");
    operator.wait_for("the failure", |lines| {
        let mut own = lines.iter().filter_map(|l| message(l, "dropped"));
        own.any(|m| m.starts_with("9 ")).then_some(())
    });
    let ticks = operator.messages("neighbour").len();
    wait_for_ticks(&operator, ticks + 12);
    assert_eq!(
        operator.messages("once").len(),
        3,
        "start, timer, and what it said"
    );
    assert_eq!(operator.messages("never"), ["1 0 0"]);
    assert_eq!(operator.messages("dropped").len(), 2, "start and error");
}

#[test]
fn nothing_comes_of_a_cancelled_operation() {
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let descriptor = json!({"version": "v1", "plural": "configmaps", "namespace": namespace.name, "labelSelector": "mine"});
    let mut wat = Wat::default();
    let watch = wat.text(descriptor.to_string());
    let request = wat.text(format!(
        "GET {}?watch=true&labelSelector=mine\n\n",
        namespace.config_maps()
    ));
    let again = wat.say32("again");
    // 1 and 2 are cancelled at once, 3 when its listing is done, 4 at its head; 5 goes on.
    wat.on(
        kind::START,
        &format!(
            "{watch} call $watch call $cancel drop {request} call $request call $cancel drop
            {watch} call $watch drop {request} call $request drop {watch} call $watch drop
            i64.const 2 call $cancel {again}"
        ),
    );
    wat.on_any(TRACE);
    let (done, needle) = (wat.say32("cancelled"), wat.text("InitDone"));
    wat.on(
        kind::ITEM,
        &format!(
            "local.get $op i64.const 3 i64.eq if
            local.get $ptr local.get $len {needle} call $find if i64.const 3 call $cancel {done} end end"
        ),
    );
    let at_head = wat.say32("cancelled at head");
    wat.on(kind::HEAD, &format!("local.get $op call $cancel {at_head}"));
    let mut setup = Setup::on(cluster);
    setup.module("child", &wat.build(), json!({}));
    let operator = setup.start();
    assert_eq!(operator.wait_for_value("child", "again"), "-5");
    assert_eq!(operator.wait_for_value("child", "cancelled"), "0");
    assert_eq!(operator.wait_for_value("child", "cancelled at head"), "0");
    // Init and InitDone of the one that goes on.
    operator.wait_for_lines(" 5 ", 2);
    let before = operator.messages("child");
    for name in ["a", "b", "c"] {
        namespace.create_config_map(name, json!({"mine": "yes"}));
    }
    let fifth = |lines: &[String]| {
        let own = lines.iter().filter_map(|l| message(l, "child"));
        own.filter(|m| m.starts_with("5 5 ")).count()
    };
    operator.wait_for("three changes", |lines| (fifth(lines) == 5).then_some(()));
    let messages = operator.messages("child");
    assert!(
        messages[before.len()..]
            .iter()
            .all(|m| m.starts_with("5 5 ")),
        "{messages:?}"
    );
    assert!(
        !messages
            .iter()
            .any(|m| m.contains(" 1 ") || m.contains(" 2 ")),
        "{messages:?}"
    );
}

/// A subscription of `poll_oneoff`: user data, and a relative clock or a readable descriptor.
fn subscription(user_data: u64, clock: Option<u64>, descriptor: u32) -> Vec<u8> {
    let mut bytes = vec![0; 48];
    bytes[..8].copy_from_slice(&user_data.to_le_bytes());
    match clock {
        Some(nanoseconds) => {
            bytes[16..20].copy_from_slice(&1_u32.to_le_bytes());
            bytes[24..32].copy_from_slice(&nanoseconds.to_le_bytes());
        }
        None => {
            bytes[8] = 1;
            bytes[16..20].copy_from_slice(&descriptor.to_le_bytes());
        }
    }
    bytes
}

#[test]
fn polling_the_idle_descriptor_sets_the_deadline() {
    const IDLE: u32 = 65_536;
    let idle = subscription(7, None, IDLE);
    let clock = |nanoseconds| subscription(8, Some(nanoseconds), 0);
    let mut wat = Wat::default();
    wat.wasi("poll_oneoff", "(param i32 i32 i32 i32) (result i32)");
    wat.wasi("fd_read", "(param i32 i32 i32 i32) (result i32)");
    wat.wasi("fd_fdstat_get", "(param i32 i32) (result i32)");
    let mut code = String::new();
    // Each with its result, the number of events, and of the first: user data and type.
    let mut poll = |wat: &mut Wat, key: &str, subscriptions: &[Vec<u8>]| {
        let (at, _) = wat.place(subscriptions.concat());
        let (result, events) = (
            wat.say32(&format!("{key} result")),
            wat.say32(&format!("{key} events")),
        );
        let (user_data, ty) = (
            wat.say64(&format!("{key} user")),
            wat.say32(&format!("{key} type")),
        );
        let count = subscriptions.len();
        write!(
            code,
            "i32.const {at} i32.const 0 i32.const {count} i32.const 512 call $poll_oneoff {result}
            i32.const 512 i32.load {events} i32.const 0 i64.load {user_data} i32.const 10 i32.load8_u {ty}"
        )
        .unwrap();
    };
    poll(&mut wat, "now", &[idle.clone(), clock(0)]);
    poll(&mut wat, "sleep", &[clock(1_000_000)]);
    poll(
        &mut wat,
        "stdout",
        &[subscription(9, None, 1), idle.clone()],
    );
    poll(
        &mut wat,
        "idle",
        &[idle.clone(), clock(3_600_000_000_000), clock(100_000_000)],
    );
    let (iov, _) = wat.place([0_u32.to_le_bytes(), 16_u32.to_le_bytes()].concat());
    let (read, flags) = (wat.say32("read"), wat.say32("flags"));
    write!(
        code,
        "i32.const {IDLE} i32.const {iov} i32.const 1 i32.const 512 call $fd_read {read}
        i32.const {IDLE} i32.const 0 call $fd_fdstat_get drop i32.const 2 i32.load16_u {flags}"
    )
    .unwrap();
    wat.on(kind::START, &code);
    let timer = wat.say("timer");
    wat.on(kind::TIMER, &timer);

    let mut for_ever = Wat::default();
    for_ever.wasi("poll_oneoff", "(param i32 i32 i32 i32) (result i32)");
    let (at, _) = for_ever.place(&idle);
    for_ever.on(
        kind::START,
        &format!("i64.const 100000000 call $timer drop i32.const {at} i32.const 0 i32.const 1 i32.const 512 call $poll_oneoff drop"),
    );
    for_ever.on_any(TRACE);

    let mut setup = Setup::alone();
    setup.module("child", &wat.build(), json!({}));
    setup.module("for-ever", &for_ever.build(), json!({}));
    setup.module("neighbour", &ticking(), json!({}));
    let operator = setup.start();
    operator.wait_for("the deadline", |lines| {
        lines
            .iter()
            .any(|l| message(l, "child") == Some("timer"))
            .then_some(())
    });
    for (key, user_data, ty) in [
        ("now", 8, 0),
        ("sleep", 8, 0),
        ("stdout", 9, 1),
        ("idle", 7, 1),
    ] {
        for (what, expected) in [
            ("result", 0),
            ("events", 1),
            ("user", user_data),
            ("type", ty),
        ] {
            let key = format!("{key} {what}");
            assert_eq!(
                operator.wait_for_value("child", &key),
                expected.to_string(),
                "{key}"
            );
        }
    }
    assert_eq!(operator.wait_for_value("child", "read"), "6", "EAGAIN");
    assert_eq!(
        operator.wait_for_value("child", "flags"),
        "4",
        "non-blocking"
    );
    let ticks = operator.messages("neighbour").len();
    wait_for_ticks(&operator, ticks + 3);
    assert_eq!(
        operator.messages("for-ever"),
        ["1 0 0"],
        "no clock, no deadline"
    );
}

#[test]
fn the_file_tree_the_environment_and_the_arguments_are_what_a_pod_has() {
    const SERVICE_ACCOUNT: &str = "var/run/secrets/kubernetes.io/serviceaccount";
    let mut wat = Wat::default();
    let four = "(param i32 i32 i32 i32) (result i32)";
    wat.wasi("fd_read", four);
    wat.wasi("fd_readdir", "(param i32 i32 i32 i64 i32) (result i32)");
    wat.wasi(
        "path_open",
        "(param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)",
    );
    wat.wasi("fd_prestat_dir_name", "(param i32 i32 i32) (result i32)");
    for name in [
        "environ_sizes_get",
        "environ_get",
        "args_sizes_get",
        "args_get",
    ] {
        wat.wasi(name, "(param i32 i32) (result i32)");
    }
    // Opens a path with flags and rights, reads up to 600 bytes to 256, and says the result of
    // opening and what was read.
    let iov = wat
        .place([256_u32.to_le_bytes(), 600_u32.to_le_bytes()].concat())
        .0;
    let mut code = String::new();
    let mut open = |wat: &mut Wat, path: &str, flags: u32, rights: u64, then: &str| {
        let (text, key) = (wat.text(path), format!("{path} {flags} {rights}"));
        let (opened, content) = (wat.say32(&key), wat.text(format!("{key} content")));
        write!(
            code,
            "i32.const 3 i32.const 0 {text} i32.const {flags} i64.const {rights} i64.const 0 i32.const 0 i32.const 8 call $path_open local.tee $i {opened}
            local.get $i i32.eqz if {then} drop i32.const 256 i32.const 12 i32.load {content} call $say_bytes end\n"
        )
        .unwrap();
    };
    let read =
        format!("i32.const 8 i32.load i32.const {iov} i32.const 1 i32.const 12 call $fd_read");
    let names = ["token", "namespace", "ca.crt"].map(|n| format!("{SERVICE_ACCOUNT}/{n}"));
    for path in names.iter().map(String::as_str).chain([
        "etc/hosts",
        "../../etc/../etc/hosts",
        "/etc/hosts",
    ]) {
        open(&mut wat, path, 0, 2, &read);
    }
    open(&mut wat, "etc/passwd", 0, 2, &read);
    open(&mut wat, "proc/self/environ", 0, 2, &read);
    open(&mut wat, "etc/hosts", 0, 1 << 6, &read);
    open(&mut wat, "etc/hosts", 8, 0, &read);
    open(&mut wat, "new", 1, 0, &read);
    open(&mut wat, "etc/hosts", 2, 0, &read);
    let list = "i32.const 8 i32.load i32.const 256 i32.const 600 i64.const 0 i32.const 12 call $fd_readdir";
    open(&mut wat, SERVICE_ACCOUNT, 2, 0, list);
    for what in ["environ", "args"] {
        let key = wat.text(what);
        write!(
            code,
            "i32.const 8 i32.const 12 call ${what}_sizes_get drop
            i32.const 131072 i32.const 140000 call ${what}_get drop
            i32.const 140000 i32.const 12 i32.load {key} call $say_bytes\n"
        )
        .unwrap();
    }
    let root = wat.text("root");
    write!(
        code,
        "i32.const 3 i32.const 256 i32.const 1 call $fd_prestat_dir_name drop i32.const 256 i32.const 1 {root} call $say_bytes"
    )
    .unwrap();
    wat.on(kind::START, &code);
    let mut setup = Setup::alone();
    setup.module(
        "child",
        &wat.build(),
        json!({
            "namespace": "home", "args": ["-v", "two words"],
            "env": [{"name": "COLOUR", "value": "red"}, {"name": "USER", "value": "me"}],
        }),
    );
    let operator = setup.start();
    assert_eq!(operator.wait_for_value("child", "root"), "/");
    let value = |key: &str| operator.wait_for_value("child", key);
    for path in &names {
        assert_eq!(value(&format!("{path} 0 2")), "0");
    }
    assert_eq!(
        value(&format!("{} 0 2 content", names[0])),
        "the-parent-operator-authenticates"
    );
    assert_eq!(value(&format!("{} 0 2 content", names[1])), "home");
    let authority = value(&format!("{} 0 2 content", names[2]));
    assert!(
        authority.starts_with("-----BEGIN CERTIFICATE"),
        "{authority}"
    );
    for path in ["etc/hosts", "../../etc/../etc/hosts", "/etc/hosts"] {
        assert!(value(&format!("{path} 0 2 content")).contains("localhost"));
    }
    for (key, errno) in [
        ("etc/passwd 0 2", "44"),
        ("proc/self/environ 0 2", "44"),
        ("etc/hosts 0 64", "69"),
        ("etc/hosts 8 0", "69"),
        ("new 1 0", "69"),
        ("etc/hosts 2 0", "54"),
    ] {
        assert_eq!(value(key), errno, "{key}");
    }
    let entries = value(&format!("{SERVICE_ACCOUNT} 2 0 content"));
    for name in ["token", "namespace", "ca.crt"] {
        assert!(entries.contains(name), "{entries}");
    }
    let environment = value("environ");
    for variable in [
        "COLOUR=red",
        "USER=me",
        "HOME=/",
        "HOSTNAME=child",
        "KUBERNETES_SERVICE_HOST=kubernetes.default",
        "KUBERNETES_SERVICE_PORT=443",
        "KUBE_RS_DEBUG_OVERRIDE_URL=http://kubernetes.default",
    ] {
        let count = environment
            .split("\\u{0}")
            .filter(|v| *v == variable)
            .count();
        assert_eq!(count, 1, "{variable} in {environment}");
    }
    assert!(!environment.contains("nobody"), "{environment}");
    assert_eq!(value("args"), r"child\u{0}-v\u{0}two words\u{0}");
}

#[test]
fn an_object_larger_than_the_first_memory_arrives_whole() {
    const BYTES: usize = 900_000;
    let cluster = Cluster::shared();
    let namespace = cluster.namespace();
    let large = json!({"metadata": {"name": "large"}, "data": {"key": "x".repeat(BYTES)}});
    cluster.create(&namespace.config_maps(), &large);
    let mut wat = Wat::default();
    let get = wat.text(json!({"version": "v1", "plural": "configmaps", "namespace": namespace.name, "name": "large"}).to_string());
    wat.on(kind::START, &format!("{get} call $get drop"));
    let (length, last) = (wat.say32("length"), wat.say32("brace"));
    let brace = wat.text("}}");
    wat.on(
        kind::RESULT,
        &format!(
            "local.get $len {length} local.get $ptr local.get $len i32.add i32.const 4 i32.sub i32.const 4 {brace} call $find i32.const 0 i32.ne {last}"
        ),
    );
    let mut setup = Setup::on(cluster);
    setup.module("child", &wat.build(), json!({}));
    let operator = setup.start();
    let length: usize = operator.wait_for_value("child", "length").parse().unwrap();
    assert!(length > BYTES, "{length}");
    assert_eq!(operator.wait_for_value("child", "brace"), "1");
}
