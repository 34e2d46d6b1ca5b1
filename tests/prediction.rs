//! Children that are woken ahead of their events, and the prediction server. No cluster.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use common::operator::{Operator, PROGRAM, Setup};
use common::wat::{Wat, kind};
use serde_json::{Value, json};

/// A guest with a deadline every half a second: long enough to sleep in between.
fn periodic() -> Vec<u8> {
    let mut wat = Wat::default();
    wat.wasi("proc_exit", "(param i32)");
    wat.on(kind::STOP, "i32.const 0 call $proc_exit");
    wat.on_any("i64.const 500000000 call $timer drop");
    wat.build()
}

/// A parent with that guest and metrics at the port it says in its log.
fn setup() -> Setup {
    let mut setup = Setup::alone();
    setup.module("periodic", &periodic(), json!({"idleSeconds": 0.02}));
    setup.set("RUST_LOG", "debug");
    setup
}

/// Status and body of an answer.
fn ask(address: &str, request: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

fn get(address: &str, path: &str) -> (u16, String) {
    ask(
        address,
        &format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"),
    )
}

fn post(address: &str, body: &str) -> (u16, Value) {
    let length = body.len();
    let (status, body) = ask(
        address,
        &format!(
            "POST /prediction HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        ),
    );
    (status, serde_json::from_str(&body).unwrap())
}

/// A prediction server and its address.
fn predictor() -> (Operator, String) {
    let mut command = Command::new(PROGRAM);
    command
        .args(["predictor", "--listen", "127.0.0.1:0"])
        .env("RUST_LOG", "debug");
    let server = Operator::spawn(command);
    let line = server.wait_for_line("predictions at http://");
    let address = line.split("http://").nth(1).unwrap();
    let address = address.trim_end_matches("/prediction").to_owned();
    (server, address)
}

#[test]
fn a_child_whose_events_are_periodic_is_woken_ahead_and_metrics_say_so() {
    let mut setup = setup();
    setup.argument("--metrics-listen").argument("127.0.0.1:0");
    let mut operator = setup.start();
    let line = operator.wait_for_line("metrics at http://");
    let address = line.split("http://").nth(1).unwrap();
    let address = address.trim_end_matches("/metrics").to_owned();
    operator.wait_for_lines("woken ahead of its event", 3);
    let (status, metrics) = get(&address, "/metrics");
    assert_eq!(status, 200);
    let metric = |name: &str| -> u32 {
        let line = metrics.lines().find_map(|l| l.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    };
    assert!(
        metric("wasm_operator_wakes_ahead_used_total ") >= 1,
        "{metrics}"
    );
    assert!(
        metric("wasm_operator_hibernations_total ") >= 3,
        "{metrics}"
    );
    assert_eq!(metric("wasm_operator_hibernation_failures_total "), 0);
    assert_eq!(get(&address, "/healthz").0, 200);
    operator.stop();
}

#[test]
fn a_child_that_does_not_want_it_is_not_woken_ahead() {
    let mut setup = Setup::alone();
    setup.set("RUST_LOG", "debug");
    let never = json!({"idleSeconds": 0.02, "prediction": "never"});
    setup.module("never", &periodic(), never);
    let mut operator = setup.start();
    operator.wait_for_lines("woken in", 10);
    assert_eq!(operator.count("woken ahead"), 0);
    operator.stop();
}

#[test]
fn a_prediction_server_is_asked() {
    let (mut server, address) = predictor();
    let mut setup = setup();
    setup.set("PREDICTION_SERVER", &format!("http://{address}/"));
    let mut operator = setup.start();
    server.wait_for_line("asked for SES over");
    operator.wait_for_line("woken ahead of its event");
    assert_eq!(operator.count("prediction server:"), 0);
    operator.stop();
    server.stop();
}

#[test]
fn a_prediction_server_that_is_not_there_disturbs_nobody() {
    let mut setup = setup();
    // Port 1 belongs to a service that nobody runs.
    setup
        .argument("--prediction-server")
        .argument("http://127.0.0.1:1");
    let mut operator = setup.start();
    operator.wait_for_lines("woken ahead of its event", 2);
    assert_eq!(
        operator.count("the built-in model answers"),
        1,
        "told once a minute"
    );
    operator.stop();
}

#[test]
fn the_server_speaks_the_prototypes_protocol() {
    let (mut server, address) = predictor();
    let history: Vec<_> = (0..20)
        .map(|i| format!("2026-01-01T00:{:02}:{:02}+01:00", i / 12, i * 5 % 60))
        .collect();
    for function in ["SES", "Holt", "Winter", "autoReg", "ARIMA"] {
        let question = json!({"history": history, "function": function});
        let (status, answer) = post(&address, &question.to_string());
        assert_eq!(status, 200, "{answer}");
        let prediction = answer["prediction"].as_str().unwrap();
        assert!(
            prediction.starts_with("2025-12-31T23:01:4")
                || prediction.starts_with("2025-12-31T23:01:39"),
            "{function}: {prediction}"
        );
    }
    for (function, expected) in [("SARIMA", 501), ("LSTM", 400)] {
        let question = json!({"history": history, "function": function});
        let (status, answer) = post(&address, &question.to_string());
        assert_eq!(status, expected);
        assert!(answer["error"].is_string(), "{answer}");
    }
    assert_eq!(post(&address, "nonsense").0, 400);
    assert_eq!(get(&address, "/prediction").0, 405);
    assert_eq!(get(&address, "/").0, 404);
    server.stop();
}
