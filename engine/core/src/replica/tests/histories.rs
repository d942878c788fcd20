//! Seeded histories. A failure names its seed; `HCI_SIM_SEED=n` replays that one, `HCI_SIM_ROUNDS=n`
//! tries so many of each kind.

use super::cluster::{Cluster, Faults};
use super::policy::Stored;
use crate::rules::{Rule, break_rules};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

const ROUNDS: u64 = 100;
const STEPS: usize = 3000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .filter(|text| !text.is_empty())
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}

fn run(faults: Faults) {
    let seeds = match number("HCI_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..number("HCI_SIM_ROUNDS").unwrap_or(ROUNDS) + 1,
    };
    let (mut healed, mut snapshots, mut merged, count) = (0, 0, 0, seeds.end - seeds.start);
    let heals = faults != Faults::Rot;
    for seed in seeds {
        let outcome = catch_unwind(AssertUnwindSafe(|| history(seed, faults)));
        let (heals, taken, gone) = outcome.unwrap_or_else(|panic| {
            eprintln!("{faults:?}: HCI_SIM_SEED={seed} replays this");
            resume_unwind(panic);
        });
        healed += heals;
        snapshots += taken;
        merged += gone;
    }
    println!(
        "{faults:?}: {healed} heals, {snapshots} snapshots, {merged} merged in {count} histories"
    );
    assert!(healed > 0 || !heals || count < ROUNDS, "no node was healed in {count} histories");
    assert!(snapshots > 0 || !heals || count < ROUNDS, "no snapshot in {count} histories");
    assert!(merged > 0 || !heals || count < ROUNDS, "no layer was merged in {count} histories");
}

/// Gives how many nodes were healed in it while things went wrong, how many snapshots were taken, and how many
/// layers were merged.
fn history(seed: u64, faults: Faults) -> (u64, u64, u64) {
    let mut cluster = Cluster::new(seed, faults);
    cluster.snapshots = faults != Faults::Rot && seed.is_multiple_of(3);
    cluster.removals = seed.is_multiple_of(2);
    for _ in 0..STEPS {
        cluster.step(true);
    }
    let healed = cluster.healed();
    cluster.settle();
    if cluster.policy.record.merging != 0 {
        cluster.take_all_out();
        cluster.check_removed();
    }
    if faults == Faults::Rot {
        match seed % 2 {
            0 => cluster.find_rot(),
            _ => _ = cluster.scrub_all(),
        }
    }
    cluster.check_replicas(false);
    cluster.read_everything();
    cluster.flush();
    cluster.settle();
    cluster.io.close();
    cluster.step(false);
    cluster.settle();
    assert_eq!(cluster.closed, Some(true), "with all replicas there, the end is clean");
    cluster.check_replicas(true);
    let Stored { top, dropped, .. } = cluster.policy.record;
    (healed, u64::from(top) - 1, u64::from(dropped.count_ones()))
}

/// Each rule is broken in turn, and noticed within so many histories of each kind.
#[test]
#[ignore = "takes minutes: cargo test -- --ignored; `heals` notices the same by their stories"]
fn broken_rules_of_heal_are_noticed_by_chance() {
    const HISTORIES: u64 = 600;
    let defects = [
        Rule::WritesAreListed,
        Rule::HealPausesWrites,
        Rule::HealedNodeAnswers,
        Rule::LostHealedIsAwaited,
        Rule::HealNeedsItsSources,
        Rule::HealedIsDurable,
        Rule::UnansweredAskedAgain,
    ];
    let unnoticed = defects.into_iter().filter(|defect| {
        break_rules(&[*defect]);
        let kinds = [Faults::Kills, Faults::GuardedPowerCuts, Faults::PowerCuts];
        let fails =
            |seed, faults| catch_unwind(AssertUnwindSafe(|| history(seed, faults))).is_err();
        let noticed = (1..=HISTORIES).find(|seed| kinds.iter().any(|faults| fails(*seed, *faults)));
        break_rules(&[]);
        println!("{defect:?}: noticed by seed {noticed:?}");
        noticed.is_none()
    });
    assert_eq!(unnoticed.collect::<Vec<_>>(), [], "rules that may be broken unnoticed");
}

/// A write is on one side of a snapshot here, and on the other there.
#[test]
fn a_snapshot_beside_writes_in_flight_is_noticed_by_chance() {
    break_rules(&[Rule::SnapshotsWaitForWrites]);
    let fails = |seed| catch_unwind(AssertUnwindSafe(|| history(seed, Faults::Kills))).is_err();
    let noticed = (0..300).step_by(3).find(|seed| fails(*seed));
    break_rules(&[]);
    println!("noticed by seed {noticed:?}");
    assert!(noticed.is_some());
}

#[test]
fn killed_nodes_and_gateways_lose_no_answered_write() {
    run(Faults::Kills);
}

#[test]
fn a_power_cut_beside_a_node_in_sync_loses_no_answered_write() {
    run(Faults::GuardedPowerCuts);
}

#[test]
fn a_repair_beside_writes_is_noticed() {
    break_rules(&[Rule::RepairPausesWrites]);
    let fails = |seed| catch_unwind(AssertUnwindSafe(|| history(seed, Faults::Rot))).is_err();
    let noticed = (1..=1000).find(|seed| fails(*seed));
    break_rules(&[]);
    println!("noticed by seed {noticed:?}");
    assert!(noticed.is_some());
}

#[test]
fn rot_on_one_node_is_never_seen_and_is_repaired() {
    run(Faults::Rot);
}

#[test]
fn power_cuts_lose_no_flushed_write() {
    run(Faults::PowerCuts);
}
